"""Leaving out neurons and whole FFNs of quantised weights, as an engine does it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from skipkernels import _C
from skipkernels.engine import Engine
from skipkernels.model.matrix import Matrix, StackedMatrix
from skipkernels.model.recipe import RECIPES
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, NeuronPolicy
from tests.models import random_prompt, tiny_engine, tiny_module
from tests.program.test_neurons import (
    GATES,
    LAYERS,
    PRODUCTS,
    assert_preempted_alike,
    decoding,
    hidden_after,
    use_isa,
)
from tests.tolerances import TOLERANCES

ISAS = pytest.mark.parametrize("isa", _C.usable_isas())
RECIPE = pytest.mark.parametrize("recipe", RECIPES)
SIZE = 256
SCALES = torch.rand(LAYERS, SIZE, generator=torch.Generator().manual_seed(5)).mul(4).sub(2).exp2().half().float()


@pytest.fixture(scope="module")
def module() -> PreTrainedModel:
    module = tiny_module(hidden_size=SIZE, intermediate_size=SIZE)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():  # gates of all sizes, so that thresholds part them
        for layer in module.model.layers:
            order = torch.randperm(SIZE, generator=generator)
            layer.mlp.gate_proj.weight *= torch.logspace(-1, 1, SIZE)[order][:, None]
    return module


def engine_of(module: PreTrainedModel, recipe: str, **options: object) -> Engine:
    return tiny_engine(module=module, dtype=recipe, **{"neuron_rows": True, **options})


def leaving_out(**values: object) -> NeuronPolicy:
    thresholds = {"gate_thresholds": GATES, "product_thresholds": PRODUCTS, "up_scales": SCALES.tolist()}
    return NeuronPolicy(**{**thresholds, "warmup_tokens": 0, **values})  # type: ignore[arg-type]


@ISAS
@RECIPE
def test_thresholds_of_zero_give_the_bits_of_the_dense_program(
    module: PreTrainedModel, isa: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_isa(monkeypatch, isa)
    engine = engine_of(module, recipe)
    zeros = leaving_out(gate_thresholds=(0.0,) * LAYERS, product_thresholds=())
    dense = hidden_after(engine, DensePolicy())
    assert torch.equal(dense, hidden_after(engine, zeros))
    assert not torch.equal(dense, hidden_after(engine, leaving_out()))
    usual = hidden_after(engine_of(module, recipe, neuron_rows=False), DensePolicy())
    torch.testing.assert_close(dense, usual, rtol=0, atol=0.02 * float(usual.abs().max()))


@ISAS
@pytest.mark.parametrize("recipe", ["q8_0", "q4_1", "q5_0", "q4_k_m"])
def test_a_row_of_a_batch_gets_what_it_gets_alone(
    module: PreTrainedModel, isa: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of many rows, decode rows of few and of many."""
    use_isa(monkeypatch, isa)
    policies = [leaving_out(warmup_tokens=1 + row % 3) if row % 4 else DensePolicy() for row in range(11)]
    prompts = [random_prompt(3 + row, seed=row) for row in range(11)]
    engine, one = engine_of(module, recipe, max_batch_size=11), engine_of(module, recipe)
    handles = [engine.submit(p, max_new_tokens=5, policy=policy) for p, policy in zip(prompts, policies, strict=True)]
    for handle, prompt, policy in zip(handles, prompts, policies, strict=True):
        together = handle.result()
        alone = one.generate(prompt, max_new_tokens=5, policy=policy)[0]
        assert together.token_ids == alone.token_ids
        assert (together.unread_map == alone.unread_map).all()


@RECIPE
def test_every_instruction_does_what_the_references_does(module: PreTrainedModel, recipe: str) -> None:
    """A prompt, then tokens in and past the warm-up."""
    policy, engine = leaving_out(warmup_tokens=2), engine_of(module, recipe)
    comparing = engine.compare_with_reference(policy)
    answer = engine.generate(random_prompt(7), max_new_tokens=5, policy=policy)[0]
    limit = TOLERANCES["int8 activations"].atol
    compared = [difference for difference in comparing.differences if difference.operand != "neurons"]
    assert {"up_proj_mul", "down_proj_neurons_add"} <= {difference.op for difference in compared}
    assert max(compared, key=lambda difference: difference.relative).relative < limit
    assert 0.05 < answer.unread_ratio < 0.6
    assert not answer.unread_map[:2].any()


def test_the_reference_executor_decodes_with_neurons_left_out(module: PreTrainedModel) -> None:
    engine = engine_of(module, "q4_1", executor="reference")
    answer = engine.generate(random_prompt(7), max_new_tokens=3, policy=leaving_out())[0]
    assert answer.unread_map[1:].any()


@pytest.mark.parametrize("recipe", ["q4_0", "q4_k_m"])
def test_a_preempted_sequence_is_computed_again_bit_for_bit(module: PreTrainedModel, recipe: str) -> None:
    assert_preempted_alike(partial(engine_of, module, recipe), leaving_out(warmup_tokens=2, target_ratio=0.2))


@RECIPE
@pytest.mark.parametrize("neuron_rows", [False, True])
def test_a_whole_ffn_that_is_skipped_is_not_read(module: PreTrainedModel, recipe: str, neuron_rows: bool) -> None:
    engine, policy = engine_of(module, recipe, neuron_rows=neuron_rows), FixedPolicy(layers=(1, 3), warmup_tokens=0)
    dense, clean = hidden_after(engine, DensePolicy()), hidden_after(engine, policy)
    assert not torch.equal(clean, dense)
    with decoding(engine, policy) as executor:
        for index in (1, 3):
            layer = engine.weights.layers[index]
            for matrix in (layer.gate_up_proj, layer.down_proj):
                assert isinstance(matrix, Matrix | StackedMatrix)
                for part in matrix.parts:
                    part.data.fill_(0xFF)  # scales that are NaN
        executor.run(1)
        assert torch.equal(engine.state.hidden_states[0], clean)
    assert hidden_after(engine, DensePolicy()).isnan().any()
