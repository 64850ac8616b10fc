"""The decisions of skip_gate, written out by hand, in the reference and in native code."""

import math
from typing import Any

import pytest
import torch

from skipkernels.program.reference import skip_gate
from skipkernels.program.table import Instruction, instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES
from tests.program.native import run_natively

WARMUP = 5


gates = pytest.mark.parametrize("run", [skip_gate, run_natively], ids=["reference", "native"])


def gate(similarities: list[float], **settings: Any) -> Instruction:
    """A gate in front of layer 1 of 3, after an FFN of layer 0 that left these similarities, at threshold 0.5."""
    rows = len(similarities)
    values: dict[str, Any] = {
        "generated": [WARMUP] * rows,
        "when": [1] * rows,
        "ran": [1] * rows,
        "skip_remaining": [0] * rows,
        "mode": "similarity",
        "batch_rule": "per_row",
        "threshold": 0.5,
        "span": 1,
        "probability": 1.0,
        "seed": 0,
        "skipped": [0] * rows,
        "threshold_scale": [1.0] * rows,
        "target_ratio": 0.0,
        "ramp_tokens": 0,
        **settings,
    }
    run_ffn = torch.ones(3, rows, dtype=torch.int32)
    run_ffn[0] = torch.tensor(values["ran"])
    return instruction(
        "skip_gate",
        when=torch.tensor(values["when"], dtype=torch.int32),
        run_ffn=run_ffn,
        skip_remaining=torch.tensor(values["skip_remaining"], dtype=torch.int32),
        similarity=torch.full((3, rows), math.nan),
        # <h, h'>, |h|^2, |h'|^2 in two parts
        similarity_partials=torch.tensor([[[0.5 * s, 2.0, 1.0], [1.5 * s, 2.0, 0.0]] for s in similarities])
        .transpose(0, 1)
        .contiguous(),
        generated=torch.tensor(values["generated"], dtype=torch.int32),
        layer=1,
        mode=GATE_MODES.index(values["mode"]),
        threshold=values["threshold"],
        span=values["span"],
        warmup_tokens=WARMUP,
        batch_rule=BATCH_RULES.index(values["batch_rule"]),
        probability=values["probability"],
        seed=values["seed"],
        skipped=torch.tensor(values["skipped"], dtype=torch.int32),
        threshold_scale=torch.tensor(values["threshold_scale"]),
        target_ratio=values["target_ratio"],
        ramp_tokens=values["ramp_tokens"],
        first_gate=1,
    )


def runs(ins: Instruction) -> list[int]:
    return ins.tensors["run_ffn"][1].tolist()


@gates
def test_each_row_skips_where_its_similarity_reaches_the_threshold(run: Any) -> None:
    ins = gate([0.4, 0.5, 0.6, -0.9])
    run(ins)
    assert runs(ins) == [1, 0, 0, 1]
    assert ins.tensors["similarity"][0].tolist() == pytest.approx([0.4, 0.5, 0.6, -0.9])
    assert ins.tensors["similarity"][1:].isnan().all()
    assert ins.tensors["run_ffn"][[0, 2]].all()


@gates
def test_a_span_counts_down_and_holds_whatever_the_similarity(run: Any) -> None:
    ins = gate([0.9, 0.1, 0.9], span=3, ran=[1, 0, 0], skip_remaining=[0, 2, 0])
    run(ins)
    assert runs(ins) == [0, 0, 1]
    assert ins.tensors["skip_remaining"].tolist() == [2, 1, 0]
    assert ins.tensors["similarity"][0].isnan().tolist() == [False, True, True]


@gates
def test_a_row_in_its_warm_up_runs_but_is_measured(run: Any) -> None:
    ins = gate([0.9, 0.9, 0.9], generated=[0, WARMUP - 1, WARMUP])
    run(ins)
    assert runs(ins) == [1, 1, 0]
    assert not ins.tensors["similarity"][0].isnan().any()


@gates
def test_a_finished_row_is_left_alone(run: Any) -> None:
    ins = gate([0.9, 0.9], when=[0, 1])
    run(ins)
    assert runs(ins) == [1, 0]
    assert ins.tensors["similarity"][0].isnan().tolist() == [True, False]


@gates
def test_a_zero_vector_has_similarity_zero(run: Any) -> None:
    ins = gate([0.9, 0.9], threshold=0.0)
    ins.tensors["similarity_partials"].zero_()
    run(ins)
    assert ins.tensors["similarity"][0].tolist() == [0, 0]
    assert runs(ins) == [0, 0]


@gates
def test_a_similarity_that_is_no_number_never_skips(run: Any) -> None:
    ins = gate([math.nan, 0.9])
    run(ins)
    assert runs(ins) == [1, 0]


HIGH, LOW = 0.9, 0.1


@gates
@pytest.mark.parametrize(
    ("rule", "similarities", "settings", "expected"),
    [
        ("all", [HIGH, HIGH, HIGH], {}, [0, 0, 0]),
        ("all", [HIGH, LOW, HIGH], {}, [1, 1, 1]),
        ("all", [HIGH, LOW, HIGH], {"when": [1, 0, 1]}, [0, 1, 0]),  # a finished row has no vote
        ("all", [HIGH, HIGH, HIGH], {"generated": [9, 9, WARMUP - 1]}, [1, 1, 1]),  # a row in its warm-up vetoes
        ("all", [HIGH, HIGH], {"generated": [9, 0], "when": [1, 0]}, [0, 1]),  # not once it is finished
        ("majority", [HIGH, HIGH, LOW], {}, [0, 0, 0]),
        ("majority", [HIGH, LOW, LOW], {}, [1, 1, 1]),
        ("majority", [HIGH, LOW], {}, [1, 1]),  # half is no majority
        ("majority", [HIGH, HIGH, LOW, LOW], {}, [1, 1, 1, 1]),
        ("majority", [HIGH, HIGH, LOW, LOW], {"when": [1, 1, 1, 0]}, [0, 0, 0, 1]),
        ("majority", [HIGH, HIGH, HIGH], {"generated": [9, 9, WARMUP - 1]}, [1, 1, 1]),
        ("majority", [HIGH], {}, [0]),
    ],
)
def test_rows_decide_together(
    run: Any, rule: str, similarities: list[float], settings: dict, expected: list[int]
) -> None:
    ins = gate(similarities, batch_rule=rule, span=2, **settings)
    run(ins)
    assert runs(ins) == expected
    assert ins.tensors["skip_remaining"].tolist() == [1 - flag for flag in expected]


@gates
def test_a_fixed_gate_skips_every_row_past_its_warm_up(run: Any) -> None:
    ins = gate([LOW] * 4, mode="fixed", generated=[0, WARMUP - 1, WARMUP, 99], when=[1, 1, 1, 1])
    run(ins)
    assert runs(ins) == [1, 1, 0, 0]
    assert ins.tensors["similarity"].isnan().all()


@gates
def test_a_random_gate_skips_as_often_as_it_is_told(run: Any) -> None:
    skipped = 0
    for step in range(100):
        ins = gate([LOW] * 8, mode="random", probability=0.3, seed=7)
        ins.tensors["generated"].copy_(torch.arange(8) + WARMUP + 8 * step)
        run(ins)
        skipped += runs(ins).count(0)
    assert 240 - 52 < skipped < 240 + 52  # four standard deviations of 800 draws


def test_random_draws_are_the_same_in_native_code() -> None:
    for seed in (0, 1, -1, 2**62):
        ins, native = (gate([LOW] * 16, mode="random", probability=0.5, seed=seed) for _ in range(2))
        for each in (ins, native):
            each.tensors["generated"].copy_(torch.arange(16) + 3)
        skip_gate(ins)
        run_natively(native)
        assert runs(ins) == runs(native)
        assert runs(ins)[:2] == [1, 1]
        assert 0 < sum(runs(ins)[2:]) < 14
