"""A skipped FFN is the identity: bitwise, and without a look at its weights. Weights that must not be read are NaN."""

import pytest
import torch

from skipkernels.engine import Engine
from skipkernels.skipping.policy import FixedPolicy, Policy, SkipPolicy
from tests.models import own_rows, random_prompt, release_rows, tiny_engine, tiny_module

PROMPT = random_prompt(7)
SKIPPED = FixedPolicy(layers=(1, 2), warmup_tokens=0)

executors = pytest.mark.parametrize("executor", ["cpu", "reference"])


def poison(engine: Engine, *layers: int) -> None:
    for layer in layers:
        for tensor in (engine.weights.layers[layer].gate_up_proj, engine.weights.layers[layer].down_proj):
            tensor.fill_(float("nan"))
        engine.weights.layers[layer].post_attention_layernorm.fill_(float("nan"))


def begin(engine: Engine, prompts: list[list[int]]) -> None:
    """Caches prompts as ``generate`` does, and makes every row look as if past its first token."""
    own = own_rows(engine)
    for slot, prompt in enumerate(prompts):
        own.begin(slot, prompt, engine.policy.plan(engine.config.num_hidden_layers))
        engine.state.num_generated[slot] = 1
    own.start()


@executors
def test_poisoned_weights_of_a_skipped_layer_change_no_bit(executor: str) -> None:
    engine = tiny_engine(executor=executor, policy=SKIPPED)
    begin(engine, [PROMPT])  # the prefill runs every FFN
    poison(engine, 1, 2)
    replay = engine.executor_for(engine.policy)
    layer = -1
    for index, ins in enumerate(replay.program):
        layer += ins.op == "qkv_rope_append"
        before = engine.state.hidden_states.clone()
        replay.run_instruction(index)
        if ins.op in ("gate_up_act", "down_proj_add"):
            unchanged = torch.equal(before.view(torch.int32), engine.state.hidden_states.view(torch.int32))
            assert unchanged == (layer in (1, 2) or ins.op == "gate_up_act")
    assert engine.state.logits.isfinite().all()


@executors
@pytest.mark.parametrize(
    "policy",
    [SKIPPED, SkipPolicy(threshold=-1.0, cold_start=0, cold_end=1, warmup_tokens=0)],
    ids=["fixed", "similarity"],
)
def test_tokens_are_the_same_with_poisoned_weights(executor: str, policy: Policy) -> None:
    """At threshold -1 layer 0 always triggers, and layers 1 and 2 are skipped too."""
    engine = tiny_engine(executor=executor, policy=policy)
    begin(engine, [PROMPT])
    engine.executor_for(policy).run(12)
    healthy = engine.state.token_ids.clone()
    release_rows()
    begin(engine, [PROMPT])
    poison(engine, 1, 2)
    engine.executor_for(policy).run(12)
    assert engine.state.num_generated[0] == 13
    assert torch.equal(engine.state.token_ids, healthy)


@executors
def test_a_row_that_skips_is_untouched_while_its_neighbours_run(executor: str) -> None:
    engine = tiny_engine(executor=executor, max_batch_size=3)
    begin(engine, [PROMPT, PROMPT, PROMPT])
    replay = engine.executor_for(engine.policy)
    s, layer = engine.state, -1
    for index, ins in enumerate(replay.program):
        layer += ins.op == "qkv_rope_append"
        if layer >= 0:
            s.run_ffn[layer, 1] = 0
        if ins.op == "down_proj_add":
            s.intermediate[1] = float("nan")
        before = s.hidden_states.clone()
        replay.run_instruction(index)
        if ins.op == "down_proj_add":
            assert torch.equal(before[1].view(torch.int32), s.hidden_states[1].view(torch.int32))
            assert not torch.equal(before[0], s.hidden_states[0])
            assert torch.equal(s.hidden_states[0], s.hidden_states[2])
    assert s.logits.isfinite().all()
    assert not torch.equal(s.logits[0], s.logits[1])


@executors
def test_the_cache_of_a_skipped_layer_is_complete(executor: str) -> None:
    engine = tiny_engine(executor=executor, policy=SKIPPED)
    (answer,) = engine.generate(PROMPT, max_new_tokens=8)
    assert answer.skip_map[1:, 1:3].all()
    cached = len(PROMPT) + 7
    layers = len(engine.weights.layers)
    filled = (engine.state.k_cache.abs().sum(-1) > 0).transpose(2, 3).flatten(1, 2)  # [layers, positions, kv_heads]
    assert (filled.any(-1) == filled.all(-1)).all()
    assert filled.all(-1).sum(-1).tolist() == [cached] * layers


def test_a_poisoned_layer_that_runs_does_show() -> None:
    engine = tiny_engine(tiny := "llama", module=tiny_module(tiny))
    begin(engine, [PROMPT])
    poison(engine, 1)
    engine.executor_for(engine.policy).run(1)
    assert engine.state.logits.isnan().all()
