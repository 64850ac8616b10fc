"""skip_gate decides as the reference does, bit for bit, over inputs that no program would bring about."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels.kernels.triton import TRITON
from skipkernels.program.philox import GATE_STREAM, philox_uniform
from skipkernels.program.reference import skip_gate
from skipkernels.program.table import Instruction, instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES
from tests.executors.programs import same_bits
from tests.tolerances import assert_close

PROMPT_ROWS = 2


def any_gate(sequences: int, layers: int, partials: int, layer: int, seed: int) -> Instruction:
    """A gate whose sequences have any policies, thresholds, spans, warm-ups and pasts, side by side."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    def reals(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    # partial sums of vectors at every angle; a zero vector now and then
    sums = reals(partials, sequences, 3) * integers(5, sequences).clamp(max=1)[:, None]
    sums[..., 0] = sums[..., 1:].prod(-1).sqrt() * (reals(sequences) * 3).cos()
    warmup = integers(6, sequences) * integers(2)  # half of all gates have none, half have low thresholds
    rule = integers(len(BATCH_RULES), sequences)
    mode = torch.tensor([0, 1, 1, 1, 1, 2, 3], dtype=torch.int32)[integers(7, sequences).long()]
    holds = (rule == 0) & (integers(2, sequences) == 0)
    return instruction(
        "skip_gate",
        row_mask=integers(4, sequences).clamp(max=1),
        run_ffn=integers(4, layers, sequences + PROMPT_ROWS).clamp(max=1),
        skip_remaining=integers(3, sequences),
        similarity=torch.full((layers, sequences), math.nan),
        similarity_partials=sums,
        num_generated=integers(60, sequences) // (1 + 9 * integers(2, sequences)),
        skipped=integers(400, sequences),
        threshold_scale=reals(sequences) * 3 + 0.01,
        gate_mode=mode,
        gated=integers(5, layers, sequences).clamp(max=1),
        first_gated=torch.where(integers(2, sequences) == 0, layer, integers(layers, sequences)).to(torch.int32),
        gate_threshold=reals(layers, sequences) * 2 - 1 - integers(2),
        gate_span=integers(40, sequences, low=1),
        warmup_tokens=warmup,
        batch_rule=rule,
        gate_probability=reals(sequences),
        gate_seed=torch.randint(-(2**63), 2**63 - 1, (sequences,), generator=generator),
        target_ratio=torch.where(holds, reals(sequences) * 0.9 + 0.01, 0.0),
        ramp_tokens=torch.where(holds, warmup + integers(30, sequences, low=1), 0).to(torch.int32),
        layer=layer,
    )


def plain_gate(similarities: list[float], **changes: Any) -> Instruction:
    """A gate in front of layer 1 of 3, each sequence deciding alone past its warm-up, at threshold 0.5."""
    sequences = len(similarities)
    ins = any_gate(sequences, 3, 2, 1, 0)
    similarity = torch.tensor(similarities)
    plain: dict[str, Any] = {
        "run_ffn": 1, "num_generated": 9, "gate_mode": 1, "gated": 1, "gate_threshold": 0.5, "gate_span": 1,
        "batch_rule": 0, "target_ratio": 0.0, "skip_remaining": 0, "similarity_partials": 1.0,
    }  # fmt: skip
    for name, value in {**plain, **changes}.items():
        ins.tensors[name].copy_(torch.as_tensor(value))
    ins.tensors["similarity_partials"][:, :, 0] = similarity
    ins.row_mask.fill_(1)
    return ins


def runs(ins: Instruction) -> list[int]:
    return ins.tensors["run_ffn"][1, :-PROMPT_ROWS].tolist()


def check(*arguments: int) -> None:
    actual, expected = any_gate(*arguments), any_gate(*arguments)
    TRITON["skip_gate"](actual)
    skip_gate(expected)
    for name, tensor in actual.tensors.items():
        if name == "similarity":
            assert_close(tensor, expected.tensors[name], "square root", name)
        else:
            assert same_bits(tensor, expected.tensors[name]), f"{name}: {tensor} and {expected.tensors[name]}"


@st.composite
def gates(draw: st.DrawFn) -> tuple[int, ...]:
    layers = draw(st.integers(2, 40))
    return (
        draw(st.integers(1, 40)),
        layers,
        draw(st.integers(1, 9)),
        draw(st.integers(1, layers - 1)),
        draw(st.integers(0, 1 << 30)),
    )


@settings(max_examples=60)
@given(gates())
def test_decisions_are_those_of_the_reference(arguments: tuple[int, ...]) -> None:
    check(*arguments)


@pytest.mark.slow
@settings(max_examples=2000, derandomize=False)
@given(gates())
def test_decisions_are_those_of_the_reference_in_a_long_sweep(arguments: tuple[int, ...]) -> None:
    check(*arguments)


@pytest.mark.parametrize("sequences", [3, 100])
def test_more_partials_than_are_read_together(sequences: int) -> None:
    """In another order than theirs, 200 partial sums give other bits."""
    check(sequences, 4, 200, 2, 4)


@pytest.mark.parametrize("partial", [0, 1])
def test_a_similarity_that_is_no_number_never_skips(partial: int) -> None:
    ins = plain_gate([math.nan, 0.9])
    ins.tensors["similarity_partials"][partial, 0, 1] = math.nan
    TRITON["skip_gate"](ins)
    assert runs(ins) == [1, 0]


@pytest.mark.parametrize(("gated", "mode", "run"), [(1, 1, 0), (0, 1, 1), (1, 0, 1)])
def test_where_a_sequence_is_not_gated_its_span_is_kept(gated: int, mode: int, run: int) -> None:
    ins = plain_gate([0.1], gated=gated, gate_mode=mode, skip_remaining=2)
    TRITON["skip_gate"](ins)
    assert runs(ins) == [run]
    assert ins.tensors["skip_remaining"].tolist() == [1 + run]


@pytest.mark.parametrize(
    ("rules", "similarities", "expected"),
    [
        ([1, 1, 1, 2, 2, 2], [0.9, 0.9, 0.9, 0.1, 0.9, 0.1], [0, 0, 0, 1, 1, 1]),
        ([1, 2, 1, 2, 1, 2], [0.9, 0.9, 0.9, 0.9, 0.1, 0.1], [1, 0, 1, 0, 1, 0]),
        ([0, 1, 2, 0, 1, 2], [0.9, 0.1, 0.9, 0.1, 0.9, 0.1], [0, 1, 1, 1, 1, 1]),  # half is no majority
    ],
)
def test_sequences_of_one_rule_decide_together(
    rules: list[int], similarities: list[float], expected: list[int]
) -> None:
    ins = plain_gate(similarities, batch_rule=rules)
    TRITON["skip_gate"](ins)
    assert runs(ins) == expected


def test_random_gates_draw_the_numbers_of_philox() -> None:
    seeds = torch.arange(16) * 2**59 - 2**62 + 5
    steps = torch.arange(16) + 9
    ins = plain_gate(
        [0.1] * 16,
        gate_mode=1 + GATE_MODES.index("random"),
        gate_probability=0.5,
        gate_seed=seeds,
        num_generated=steps,
    )
    TRITON["skip_gate"](ins)
    draws = [
        float(philox_uniform(seed, 1, step, GATE_STREAM))
        for seed, step in zip(seeds.tolist(), steps.tolist(), strict=True)
    ]
    assert runs(ins) == [0 if draw < 0.5 else 1 for draw in draws]
    assert len(set(runs(ins))) == 2
