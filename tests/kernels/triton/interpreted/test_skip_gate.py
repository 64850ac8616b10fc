"""skip_gate decides as the native executor does, bit for bit, over inputs that no program would bring about."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels.kernels.triton import TRITON
from skipkernels.program.philox import GATE_STREAM, philox_uniform
from skipkernels.program.table import Instruction, instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES
from tests.executors.programs import same_bits
from tests.program.native import run_natively
from tests.program.test_skip_gate import WARMUP, gate, runs

VARIANTS = ["per_row", "all", "majority", "fixed", "random", "holding a ratio"]


@st.composite
def gates(draw: st.DrawFn, variant: str) -> dict[str, Any]:
    rows, layers, partials = draw(st.integers(1, 16)), draw(st.integers(2, 40)), draw(st.integers(1, 9))
    warmup = draw(st.integers(0, 6))
    holds = variant == "holding a ratio"
    return {
        "rows": rows,
        "layers": layers,
        "partials": partials,
        "layer": draw(st.integers(1, layers - 1)),
        "mode": GATE_MODES.index(variant if variant in GATE_MODES else "similarity"),
        "batch_rule": BATCH_RULES.index(variant if variant in BATCH_RULES else "per_row"),
        "threshold": draw(st.floats(-1.0, 1.0)),
        "span": draw(st.integers(1, 40)),
        "warmup_tokens": warmup,
        "probability": draw(st.floats(0.0, 1.0, width=32)),  # an fp32 operand: interpreted kernels would take more
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
        "target_ratio": draw(st.floats(0.01, 0.9)) if holds else 0.0,
        "ramp_tokens": warmup + draw(st.integers(1, 30)),
        "first_gate": draw(st.integers(0, 1)),
        "tokens": warmup + draw(st.sampled_from([3, 60])),  # a row has generated fewer
        "data": draw(st.integers(0, 1 << 30)),
    }


def build(settings: dict[str, Any]) -> Instruction:
    values = dict(settings)
    rows, layers, partials = values.pop("rows"), values.pop("layers"), values.pop("partials")
    tokens = values.pop("tokens")
    generator = torch.Generator().manual_seed(values.pop("data"))

    def integers(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.int32)

    # partial sums of vectors at every angle; a zero vector now and then
    angle = torch.rand(rows, generator=generator) * 3
    sums = torch.rand(partials, rows, 3, generator=generator) * integers(5, rows).clamp(max=1)[:, None]
    sums[..., 0] = sums[..., 1:].prod(-1).sqrt() * angle.cos()
    return instruction(
        "skip_gate",
        when=integers(4, rows).clamp(max=1),
        run_ffn=integers(2, layers, rows),
        skip_remaining=integers(3, rows),
        similarity=torch.full((layers, rows), math.nan),
        similarity_partials=sums,
        generated=integers(tokens, rows),
        skipped=integers(400, rows),
        threshold_scale=torch.rand(rows, generator=generator) * 3 + 0.01,
        **values,
    )


def check(settings: dict[str, Any]) -> None:
    actual, expected = build(settings), build(settings)
    TRITON["skip_gate"](actual)
    run_natively(expected)
    for name, tensor in actual.tensors.items():
        assert same_bits(tensor, expected.tensors[name]), f"{name}: {tensor} and {expected.tensors[name]}"


@pytest.mark.parametrize("variant", VARIANTS)
@given(data=st.data())
def test_decisions_are_those_of_native_code(variant: str, data: st.DataObject) -> None:
    check(data.draw(gates(variant)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=500, derandomize=False)
@given(data=st.data())
def test_decisions_are_those_of_native_code_in_a_long_sweep(variant: str, data: st.DataObject) -> None:
    check(data.draw(gates(variant)))


def test_more_partials_than_are_read_together() -> None:
    """In another order than theirs, 200 partial sums give other bits."""
    check({
        "rows": 3, "layers": 4, "partials": 200, "layer": 2, "mode": 0, "batch_rule": 0, "threshold": 0.5, "span": 1,
        "warmup_tokens": 0, "probability": 0.0, "seed": 0, "target_ratio": 0.3, "ramp_tokens": 9, "first_gate": 1,
        "tokens": 9, "data": 4,
    })  # fmt: skip


@pytest.mark.parametrize("partial", [0, 1])
def test_a_similarity_that_is_no_number_never_skips(partial: int) -> None:
    ins = gate([math.nan, 0.9])
    ins.tensors["similarity_partials"][partial, 0, 1] = math.nan
    TRITON["skip_gate"](ins)
    assert runs(ins) == [1, 0]


def test_random_gates_draw_the_numbers_of_philox() -> None:
    ins = gate([0.1] * 16, mode="random", probability=0.5, seed=-(2**62) + 5)
    ins.tensors["generated"].copy_(torch.arange(16) + WARMUP)
    TRITON["skip_gate"](ins)
    draws = [float(philox_uniform(-(2**62) + 5, 1, step + WARMUP, GATE_STREAM)) for step in range(16)]
    assert runs(ins) == [0 if draw < 0.5 else 1 for draw in draws]
