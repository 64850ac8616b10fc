"""Leaving neurons of experts out: a literal rendering on transformers' modules, bits, and weights that must not be
read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from skipkernels import _C
from skipkernels.engine import Engine
from skipkernels.errors import PolicyError
from skipkernels.model.matrix import float_tensor
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, Policy, SkipPolicy
from tests.models import random_prompt, tiny_engine, tiny_module
from tests.program.test_neurons import assert_preempted_alike, decoding, hidden_after, use_isa

FAMILIES = ["qwen3_moe", "qwen3_moe with dense layers", "mixtral", "gpt_oss"]
LAYERS = 4
GATES, PRODUCTS = (0.0, 0.2, 0.3, 0.15), (0.1, 0.05, 0.0, 0.1)
ISAS = _C.usable_isas()
Kept = list[tuple[set[tuple[int, int]], set[tuple[int, int]]]]
"""Of each layer the (expert, neuron) pairs whose rows of up_proj and of down_proj are read."""


def module_of(family: str) -> PreTrainedModel:
    return tiny_module(family)


def engine_of(family: str, **options: Any) -> Engine:
    return tiny_engine(module=module_of(family), neuron_rows=True, **options)


def rule(**values: Any) -> NeuronPolicy:
    return NeuronPolicy(**{"gate_thresholds": GATES, "product_thresholds": PRODUCTS, "warmup_tokens": 0, **values})


def matrices(experts: torch.nn.Module, expert: int) -> tuple[torch.Tensor, ...]:
    """gate, up [neurons, hidden] and down [neurons, hidden] of an expert, and their biases."""
    if not hasattr(experts, "gate_up_proj_bias"):
        gate, up = experts.gate_up_proj[expert].chunk(2)
        zeros = torch.zeros(len(gate))
        return gate, up, experts.down_proj[expert].T, zeros, zeros, torch.zeros(gate.shape[1])
    gate_up, bias = experts.gate_up_proj[expert].T, experts.gate_up_proj_bias[expert]  # gpt-oss alternates the two
    down, down_bias = experts.down_proj[expert], experts.down_proj_bias[expert]
    return gate_up[::2], gate_up[1::2], down, bias[::2], bias[1::2], down_bias


def activated(experts: torch.nn.Module, gate: torch.Tensor) -> torch.Tensor:
    if not hasattr(experts, "alpha"):
        return experts.act_fn(gate)
    gate = gate.clamp(max=experts.limit)
    return gate * torch.sigmoid(experts.alpha * gate)


def literal(
    experts: torch.nn.Module, n: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, a: float, b: float
) -> tuple[torch.Tensor, tuple[set[tuple[int, int]], set[tuple[int, int]]]]:
    """The semantics, word by word, for one token n [hidden]."""
    f, kept_up, kept_down = torch.zeros_like(n), set(), set()
    for expert, weight in zip(chosen.tolist(), weights, strict=True):
        gate, up, down, gate_bias, up_bias, down_bias = matrices(experts, expert)
        own = torch.zeros_like(n)
        for j in range(len(gate)):
            g = activated(experts, gate[j] @ n + gate_bias[j])
            if g.abs() < a:
                continue
            kept_up.add((expert, j))
            u = up[j] @ n + up_bias[j]
            m = g * (u.clamp(-experts.limit, experts.limit) + 1 if hasattr(experts, "limit") else u)
            if m.abs() < b:
                continue
            kept_down.add((expert, j))
            own = own + m * down[j]
        f = f + weight * (own + down_bias)
    return f, (kept_up, kept_down)


@contextmanager
def leaving_out(
    module: PreTrainedModel, gates: tuple[float, ...], products: tuple[float, ...], kept: Kept
) -> Iterator[None]:
    """For a module that is called with one token. A layer without experts runs in full."""
    changed = []
    for index, layer in enumerate(module.model.layers):
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            continue

        def forward(n: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, index=index, experts=experts):
            f, sets = literal(experts, n.view(-1), chosen.view(-1), weights.view(-1), gates[index], products[index])
            kept.append(sets)
            return f.view_as(n)

        experts.forward = forward
        changed.append(experts)
    try:
        yield
    finally:
        for experts in changed:
            del experts.forward


def with_experts(module: PreTrainedModel) -> list[int]:
    return [index for index, layer in enumerate(module.model.layers) if hasattr(layer.mlp, "experts")]


def only_of(values: tuple[float, ...], layers: list[int]) -> tuple[float, ...]:
    return tuple(value if layer in layers else 0.0 for layer, value in enumerate(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_literal_rendering_keeps_as_many_neurons_and_says_the_same(family: str) -> None:
    module, prompt, steps = module_of(family), random_prompt(7), 6
    layers = with_experts(module)
    gates, products = only_of(GATES, layers), only_of(PRODUCTS, layers)
    engine = engine_of(family)
    policy = rule(gate_thresholds=gates, product_thresholds=products, warmup_tokens=2)
    answer = engine.generate(prompt, max_new_tokens=steps, policy=policy, eos_token_ids=())[0]
    neurons = engine.config.num_experts_per_tok * engine.config.moe_intermediate_size
    expert = 3 * engine.config.moe_intermediate_size * engine.config.hidden_size
    router = engine.config.num_experts * engine.config.hidden_size
    whole = engine.config.num_experts_per_tok * expert + router

    with torch.no_grad():
        output = module(torch.tensor([prompt]), use_cache=True)
        tokens = [int(output.logits[0, -1].argmax())]
        for step in range(1, steps):
            kept: Kept = []
            now = (gates, products) if step >= 2 else ((0.0,) * LAYERS,) * 2
            with leaving_out(module, *now, kept):
                output = module(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            left_out = [(2 * neurons - len(up) - len(down)) * engine.config.hidden_size for up, down in kept]
            np.testing.assert_allclose(answer.unread_map[step, layers], np.array(left_out) / whole, atol=1e-6)
            tokens.append(int(output.logits[0, -1].argmax()))
    assert answer.token_ids == tokens
    assert 0.05 < answer.unread_ratio < 0.6
    assert not answer.unread_map[:2].any()


def kept_of(engine: Engine, policy: Policy) -> Kept:
    """Of every layer with experts, in the step that ``hidden_after`` runs last."""
    found: Kept = []
    with decoding(engine, policy) as executor:
        for index, ins in enumerate(executor.program):
            executor.run_instruction(index)
            if ins.op not in ("experts_gate_up_act", "experts_down_proj_neurons_add"):
                continue
            chosen = engine.state.expert_ids[0].tolist()
            places = (engine.state.expert_intermediate[0] != 0).nonzero().tolist()
            neurons = {(chosen[choice], neuron) for choice, neuron in places}
            if ins.op == "experts_gate_up_act":
                found.append((neurons, set()))
            else:
                found[-1] = found[-1][0], neurons
    return found


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kept_neurons_are_those_of_the_literal_rendering(
    family: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(monkeypatch, isa)
    module, prompt = module_of(family), random_prompt(6)
    layers = with_experts(module)
    gates, products = only_of(GATES, layers), only_of(PRODUCTS, layers)
    own = kept_of(engine_of(family), rule(gate_thresholds=gates, product_thresholds=products))
    kept: Kept = []
    with torch.no_grad():
        cached = module(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        with leaving_out(module, gates, products, kept):
            module(torch.tensor([prompt[-1:]]), past_key_values=cached, use_cache=True)
    assert own == kept
    up, down = (sum(len(sets[stage]) for sets in kept) for stage in (0, 1))
    neurons = len(kept) * len(kept[0][0] | {(-1, -1)})  # the first layer keeps all of up_proj
    assert neurons * 0.3 < down < up < neurons


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isa", ISAS)
def test_thresholds_of_zero_give_the_bits_of_the_dense_program(
    family: str, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(monkeypatch, isa)
    engine = engine_of(family, dtype=dtype)
    dense, kept = (
        hidden_after(engine, policy)
        for policy in (DensePolicy(), rule(gate_thresholds=(0.0,) * LAYERS, product_thresholds=()))
    )
    assert torch.equal(dense, kept)
    assert not torch.equal(dense, hidden_after(engine, rule()))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_of_a_batch_gets_what_it_gets_alone(
    family: str, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 11 rows tasks are panels of columns, of one chunks of neurons; prompts keep all beside them."""
    use_isa(monkeypatch, isa)
    policies = [
        rule(gate_thresholds=tuple(row / 6 * gate for gate in GATES), warmup_tokens=1 + row % 3)
        if row % 4
        else DensePolicy()
        for row in range(11)
    ]
    prompts = [random_prompt(3 + row, seed=row) for row in range(11)]
    engine, one = engine_of(family, dtype=dtype, max_batch_size=11), engine_of(family, dtype=dtype)
    handles = [engine.submit(p, max_new_tokens=5, policy=policy) for p, policy in zip(prompts, policies, strict=True)]
    for handle, prompt, policy in zip(handles, prompts, policies, strict=True):
        together = handle.result()
        alone = one.generate(prompt, max_new_tokens=5, policy=policy)[0]
        assert together.token_ids == alone.token_ids
        assert (together.unread_map == alone.unread_map).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isa", ISAS)
def test_weights_of_neurons_left_out_are_not_read(
    family: str, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(monkeypatch, isa)
    engine = engine_of(family, dtype=dtype)
    layers = with_experts(module_of(family))
    policy = rule(gate_thresholds=only_of(GATES, layers), product_thresholds=only_of(PRODUCTS, layers))
    clean, kept = hidden_after(engine, policy), kept_of(engine, policy)
    with decoding(engine, policy) as executor:  # the prompt, which reads all, is cached
        left_out = poison(engine, dict(zip(layers, kept, strict=True)))
        executor.run(1)
        assert torch.equal(engine.state.hidden_states[0], clean)
    assert left_out > 20
    assert hidden_after(engine, DensePolicy()).isnan().any()


def poison(engine: Engine, kept: dict[int, tuple[set[tuple[int, int]], set[tuple[int, int]]]]) -> int:
    """Every row of up_proj and down_proj whose neuron is not kept; returns how many those of chosen experts are."""
    left_out, size = 0, engine.config.moe_intermediate_size
    for layer, (up, down) in kept.items():
        weights = engine.weights.layers[layer]
        ups = float_tensor(weights.gate_up_proj).view(engine.config.num_experts, 2, size, -1)[:, 1]
        downs = float_tensor(weights.down_proj).T.view(engine.config.num_experts, size, -1)
        chosen = {expert for expert, _ in up}
        for rows, own in ((ups, up), (downs, down)):
            for expert in range(engine.config.num_experts):
                for neuron in range(size):
                    if (expert, neuron) not in own:
                        rows[expert, neuron] = float("nan")
                        left_out += expert in chosen
    return left_out


def test_blocks_and_neurons_together() -> None:
    engine = engine_of("qwen3_moe")
    policy = SkipPolicy(
        threshold=-1.0, first_dense_layers=0, last_dense_layers=0, span=1, warmup_tokens=0, gate_thresholds=GATES
    )
    answer = engine.generate(random_prompt(5), max_new_tokens=6, policy=policy, eos_token_ids=())[0]
    assert answer.skip_map.any()
    assert (answer.unread_map[answer.skip_map] == 1).all()
    partly = answer.unread_map[~answer.skip_map]
    assert ((partly >= 0) & (partly < 1)).all()
    assert partly.any()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe with dense layers"])
def test_a_held_ratio_is_held_whatever_the_thresholds(family: str) -> None:
    engine = engine_of(family, max_seq_len=300)
    for factor in (0.1, 1.0, 5.0):
        policy = rule(
            gate_thresholds=(0.1 * factor,) * LAYERS,
            product_thresholds=(0.05 * factor,) * LAYERS,
            warmup_tokens=4,
            target_ratio=0.25,
        )
        answer = engine.generate(random_prompt(5), max_new_tokens=200, policy=policy, eos_token_ids=())[0]
        assert answer.unread_ratio == pytest.approx(0.25, abs=0.01)


def test_a_preempted_sequence_is_computed_again_bit_for_bit() -> None:
    assert_preempted_alike(partial(engine_of, "qwen3_moe"), rule(warmup_tokens=2, target_ratio=0.2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_module_keeps_its_values_and_shares_the_storage(family: str) -> None:
    module = module_of(family)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    engine = tiny_engine(module=module, neuron_rows=True)
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name])
    down_proj = module.model.layers[0].mlp.experts.down_proj
    assert down_proj.data_ptr() == float_tensor(engine.weights.layers[0].down_proj).data_ptr()


def test_what_cannot_be_done_is_refused_by_name() -> None:
    scaled = rule(up_scales=[[1.0] * 24] * LAYERS)
    message = "up_scales has 24 entries per layer, but this model has experts, whose neurons share"
    with pytest.raises(PolicyError, match=message):
        engine_of("qwen3_moe").generate(random_prompt(3), policy=scaled)
    with pytest.raises(PolicyError, match=message):
        engine_of("qwen3_moe", policy=scaled)
    with pytest.raises(PolicyError, match="down_proj lies as in the checkpoint, where a neuron is a column; load the"):
        tiny_engine("mixtral").generate(random_prompt(3), policy=rule())
    beyond = rule(gate_thresholds=(0.1,) * LAYERS, target_ratio=0.66)  # of two thirds, but the router is read too
    with pytest.raises(PolicyError, match=r"target_ratio 0\.66 cannot be held: .* less than 0\.6"):
        engine_of("mixtral").generate(random_prompt(3), policy=beyond)
