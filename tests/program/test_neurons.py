"""Leaving neurons out: a literal rendering on transformers' modules, bits, and weights that must not be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, Policy, SkipPolicy
from tests.models import random_prompt, tiny_config, tiny_engine, tiny_module

LAYERS = 4
GATES, PRODUCTS = (0.0, 0.02, 0.05, 0.03), (0.01, 0.002, 0.0, 0.02)
ONES = torch.ones(LAYERS, tiny_config().intermediate_size)
SCALES = torch.rand(ONES.shape, generator=torch.Generator().manual_seed(5)).mul(4).sub(2).exp2().half().float()


@pytest.fixture(scope="module")
def module() -> PreTrainedModel:
    module = tiny_module()
    with torch.no_grad():  # gates of some size, so that thresholds part them
        for layer in module.model.layers:
            layer.mlp.gate_proj.weight *= 20
    return module


@contextmanager
def leaving_out(
    module: PreTrainedModel,
    gates: tuple[float, ...],
    products: tuple[float, ...],
    scales: torch.Tensor,
    kept: list[list[set[int]]],
) -> Iterator[None]:
    """The semantics, word by word, for a module that is called with one token."""

    def forward(index: int, mlp: torch.nn.Module, n: torch.Tensor) -> torch.Tensor:
        f, sets = torch.zeros(n.shape[-1]), [set(), set()]
        for j in range(mlp.gate_proj.weight.shape[0]):
            g = mlp.act_fn(mlp.gate_proj.weight[j] @ n[0, 0])
            if g.abs() * scales[index, j] < gates[index]:
                continue
            sets[0].add(j)
            m = g * (mlp.up_proj.weight[j] @ n[0, 0])
            if m.abs() < products[index]:
                continue
            sets[1].add(j)
            f = f + m * mlp.down_proj.weight[:, j]
        kept.append(sets)
        return f[None, None]

    for index, layer in enumerate(module.model.layers):
        layer.mlp.forward = lambda n, index=index, mlp=layer.mlp: forward(index, mlp, n)
    try:
        yield
    finally:
        for layer in module.model.layers:
            del layer.mlp.forward


def engine_of(module: PreTrainedModel, **options: object) -> Engine:
    return tiny_engine(module=module, neuron_rows=True, **options)


def scaled(scales: torch.Tensor, **values: Any) -> NeuronPolicy:
    return NeuronPolicy(gate_thresholds=GATES, product_thresholds=PRODUCTS, up_scales=scales.tolist(), **values)


@pytest.mark.parametrize("scales", [ONES, SCALES], ids=["layers", "neurons"])
def test_a_literal_rendering_keeps_as_many_neurons_and_says_the_same(
    module: PreTrainedModel, scales: torch.Tensor
) -> None:
    prompt, steps = random_prompt(7), 6
    engine = engine_of(module)
    policy = scaled(scales, warmup_tokens=2)
    answer = engine.generate(prompt, max_new_tokens=steps, policy=policy)[0]

    with torch.no_grad():
        output = module(torch.tensor([prompt]), use_cache=True)
        tokens, size = [int(output.logits[0, -1].argmax())], module.config.intermediate_size
        for step in range(1, steps):
            warm, kept = step >= 2, []
            gates, products = (GATES, PRODUCTS) if warm else ((0.0,) * LAYERS,) * 2
            with leaving_out(module, gates, products, scales, kept):
                output = module(torch.tensor([tokens[-1:]]), past_key_values=output.past_key_values, use_cache=True)
            unread = [(2 - sum(map(len, sets)) / size) / 3 for sets in kept]
            np.testing.assert_allclose(answer.unread_map[step], unread, atol=1e-6)
            tokens.append(int(output.logits[0, -1].argmax()))
    assert answer.token_ids == tokens
    assert 0.05 < answer.unread_ratio < 0.6
    assert not answer.unread_map[:2].any()
    assert not answer.skip_map.any()


@pytest.mark.parametrize("isa", _C.usable_isas())
def test_the_kept_neurons_are_those_of_the_literal_rendering(
    module: PreTrainedModel, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(monkeypatch, isa)
    prompt = random_prompt(6)
    up, down = left_out_rows(engine_of(module), scaled(SCALES, warmup_tokens=0))
    kept: list[list[set[int]]] = []
    with torch.no_grad():
        cached = module(torch.tensor([prompt[:-1]]), use_cache=True).past_key_values
        with leaving_out(module, GATES, PRODUCTS, SCALES, kept):
            module(torch.tensor([prompt[-1:]]), past_key_values=cached, use_cache=True)
    for layer, sets in enumerate(kept):
        for own, (_, left_out) in zip(sets, (up[layer], down[layer]), strict=True):
            assert own == set((~left_out).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("isa", _C.usable_isas())
def test_thresholds_of_zero_give_the_bits_of_the_dense_program(
    module: PreTrainedModel, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(monkeypatch, isa)
    engine = engine_of(module, dtype=dtype)
    zeros = NeuronPolicy(gate_thresholds=(0.0,) * LAYERS, up_scales=SCALES.tolist(), warmup_tokens=0)
    dense, kept = (hidden_after(engine, policy) for policy in (DensePolicy(), zeros))
    assert torch.equal(dense, kept)
    left_out = hidden_after(engine, NeuronPolicy(gate_thresholds=GATES, warmup_tokens=0))
    assert not torch.equal(dense, left_out)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", _C.usable_isas())
def test_a_row_of_a_batch_gets_what_it_gets_alone(
    module: PreTrainedModel, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(monkeypatch, isa)
    policies = [
        scaled(SCALES.roll(row, dims=1) if row % 2 else ONES, warmup_tokens=1 + row % 3) if row % 4 else DensePolicy()
        for row in range(11)
    ]
    prompts = [random_prompt(3 + row, seed=row) for row in range(11)]
    engine, one = engine_of(module, dtype=dtype, max_batch_size=11), engine_of(module, dtype=dtype)
    handles = [engine.submit(p, max_new_tokens=5, policy=policy) for p, policy in zip(prompts, policies, strict=True)]
    for handle, prompt, policy in zip(handles, prompts, policies, strict=True):
        together = handle.result()
        alone = one.generate(prompt, max_new_tokens=5, policy=policy)[0]
        assert together.token_ids == alone.token_ids
        assert (together.unread_map == alone.unread_map).all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("isa", _C.usable_isas())
def test_weights_of_neurons_left_out_are_not_read(
    module: PreTrainedModel, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(monkeypatch, isa)
    poisoned = tiny_module()
    poisoned.load_state_dict(module.state_dict())
    engine = engine_of(poisoned, dtype=dtype)
    policy = scaled(SCALES, warmup_tokens=0)
    clean = hidden_after(engine, policy)
    unread = left_out_rows(engine, policy)
    with decoding(engine, policy) as executor:  # the prompt, which reads all, is cached
        poison(engine, unread)
        executor.run(1)
        assert torch.equal(engine.state.hidden_states[0], clean)
    assert hidden_after(engine, DensePolicy()).isnan().any()


def poison(engine: Engine, unread: tuple[list, list]) -> None:
    for (layer, unread_up), (_, unread_down) in zip(*unread, strict=True):
        weights = engine.weights.layers[layer]
        weights.gate_up_proj[engine.config.intermediate_size :][unread_up] = float("nan")  # type: ignore[index]
        weights.down_proj.T[unread_down] = float("nan")  # type: ignore[union-attr]


def left_out_rows(engine: Engine, policy: NeuronPolicy) -> tuple[list, list]:
    """(layer, neurons) that neither list of the step that ``hidden_after`` runs last holds, for up and for down."""
    found: dict[str, list] = {"up_proj_mul": [], "down_proj_neurons_add": []}
    with decoding(engine, policy) as executor:
        for index, ins in enumerate(executor.program):
            executor.run_instruction(index)
            if ins.op == "select_neurons":
                mask = torch.ones(engine.config.intermediate_size, dtype=torch.bool)
                mask[engine.state.neurons[: int(engine.state.num_neurons)].long()] = False
                found[executor.program[index + 1].op].append((int(ins.scalars["layer"]), mask))
    assert sum(int(mask.sum()) for _, mask in found["up_proj_mul"]) > 20
    return found["up_proj_mul"], found["down_proj_neurons_add"]


@contextmanager
def decoding(engine: Engine, policy: Policy) -> Iterator[Any]:
    """The executor, before a step of one row that is past its warm-up."""
    with engine.loop.own_rows() as own:
        own.begin(0, random_prompt(6), policy.plan(LAYERS))
        own.start()
        engine.state.num_generated[0] = 5
        yield engine.executor_for(policy)


def hidden_after(engine: Engine, policy: Policy) -> torch.Tensor:
    """The residual stream after one decoded token."""
    with decoding(engine, policy) as executor:
        executor.run(1)
        assert engine.state.hidden_states[0].any()
        return engine.state.hidden_states[0].clone()


def use_isa(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    def executor(_: object, program, state) -> CpuExecutor:
        return CpuExecutor(program, state, num_threads=2, isa=isa)

    monkeypatch.setattr("skipkernels.executors.variants.get_executor", executor)


def test_blocks_and_neurons_together(module: PreTrainedModel) -> None:
    engine = engine_of(module)
    policy = SkipPolicy(
        threshold=-1.0, first_dense_layers=0, last_dense_layers=0, span=1, warmup_tokens=0, gate_thresholds=GATES
    )
    answer = engine.generate(random_prompt(5), max_new_tokens=6, policy=policy)[0]
    assert answer.skip_map.any()
    assert (answer.unread_map[answer.skip_map] == 1).all()
    partly = answer.unread_map[~answer.skip_map]
    assert ((partly >= 0) & (partly < 1)).all()
    assert partly.any()


def test_weights_that_do_not_lie_for_it_are_refused(module: PreTrainedModel) -> None:
    engine = tiny_engine(module=tiny_module())
    with pytest.raises(PolicyError, match="down_proj lies as in the checkpoint, where a neuron is a column; load the"):
        engine.generate(random_prompt(3), policy=NeuronPolicy(gate_thresholds=GATES))
    own = tiny_engine(module=tiny_module(), policy=NeuronPolicy(gate_thresholds=GATES))
    assert own.weights.neuron_rows


def test_scales_of_another_model_are_refused(module: PreTrainedModel) -> None:
    wide = scaled(ONES.repeat(1, 2))
    message = f"up_scales has {2 * ONES.shape[1]} entries per layer, the model's FFNs have {ONES.shape[1]} neurons"
    with pytest.raises(PolicyError, match=message):
        engine_of(module).generate(random_prompt(3), policy=wide)
    with pytest.raises(PolicyError, match=message):
        engine_of(module, policy=wide)
    with pytest.raises(PolicyError, match="up_scales has 3 layers, gate_thresholds 4"):
        scaled(ONES[:3])


def test_thresholds_of_single_neurons_take_memory_only_where_they_can_be_left_out(module: PreTrainedModel) -> None:
    assert tiny_engine(module=tiny_module()).state.gate_thresholds.numel() == 0
    assert engine_of(module).state.gate_thresholds.shape == (1, *ONES.shape)


def test_a_loaded_module_shares_the_transposed_storage(module: PreTrainedModel) -> None:
    module = tiny_module()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    engine = engine_of(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, expected[name])
    down_proj = module.model.layers[1].mlp.down_proj.weight
    assert down_proj.data_ptr() == engine.weights.layers[1].down_proj.data_ptr()  # type: ignore[union-attr]


@pytest.mark.parametrize("target", [0.1, 0.3])
def test_a_held_ratio_is_held_whatever_the_thresholds(target: float) -> None:
    engine = engine_of(tiny_module(), max_seq_len=300)
    for factor in (0.1, 1.0, 5.0):
        policy = NeuronPolicy(
            gate_thresholds=(0.02 * factor,) * LAYERS,
            product_thresholds=(0.01 * factor,) * LAYERS,
            warmup_tokens=4,
            target_ratio=target,
        )
        answer = engine.generate(random_prompt(5), max_new_tokens=200, policy=policy, eos_token_ids=())[0]
        assert answer.unread_ratio == pytest.approx(target, abs=0.01)


def assert_preempted_alike(engine_with: Callable[..., Engine], policy: Policy) -> None:
    """``engine_with`` options decodes the same where sequences give way to each other and where they need not."""
    roomy = engine_with(max_batch_size=3, max_seq_len=128)
    block = roomy.state.cache_bytes() // roomy.state.num_blocks
    tight = engine_with(max_batch_size=3, max_seq_len=128, cache_bytes=6 * block)
    prompts = [random_prompt(20 + row, seed=row) for row in range(3)]
    answers = [
        engine.generate(prompts, max_new_tokens=70, policy=policy, eos_token_ids=()) for engine in (roomy, tight)
    ]
    for expected, actual in zip(*answers, strict=True):
        assert actual.token_ids == expected.token_ids
        assert (actual.unread_map == expected.unread_map).all()


def test_a_preempted_sequence_is_computed_again_bit_for_bit(module: PreTrainedModel) -> None:
    assert_preempted_alike(partial(engine_of, module), scaled(SCALES, warmup_tokens=2, target_ratio=0.2))
