"""The decisions of skip_gate, written out by hand, in the reference and in native code."""

import math
from typing import Any

import pytest
import torch

from skipkernels.program.reference import skip_gate
from skipkernels.program.table import Instruction, instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES
from tests.executors.programs import same_bits
from tests.program.native import run_natively

WARMUP = 5
LAYERS = 3
PROMPT_ROWS = 2
MODES = ("dense", *GATE_MODES)
DEFAULTS: dict[str, Any] = {
    "num_generated": WARMUP,
    "row_mask": 1,
    "ran": 1,  # the FFN before the gate
    "skip_remaining": 0,
    "mode": "similarity",
    "gated": 1,  # the gate's own layer
    "first_gated": 1,
    "batch_rule": "per_row",
    "threshold": 0.5,
    "span": 1,
    "warmup": WARMUP,
    "probability": 1.0,
    "seed": 0,
    "skipped": 0,
    "threshold_scale": 1.0,
    "target_ratio": 0.0,
    "ramp_tokens": 0,
}


gates = pytest.mark.parametrize("run", [skip_gate, run_natively], ids=["reference", "native"])


def gate(similarities: list[float], layer: int = 1, **settings: Any) -> Instruction:
    """A gate in front of ``layer`` of 3, after an FFN that left these similarities, at threshold 0.5; behind the decode
    rows stand prompt rows. A setting holds for every sequence, or is a list with one for each."""
    sequences = len(similarities)
    assert set(settings) <= set(DEFAULTS)
    values: dict[str, list[Any]] = {
        name: value if isinstance(value, list) else [value] * sequences
        for name, value in {**DEFAULTS, **settings}.items()
    }

    def i32(name: str) -> torch.Tensor:
        return torch.tensor(values[name], dtype=torch.int32)

    run_ffn = torch.ones(LAYERS, sequences + PROMPT_ROWS, dtype=torch.int32)
    run_ffn[layer - 1, :sequences] = i32("ran")
    # what holds for other layers must not matter here
    gated = (1 - i32("gated")).repeat(LAYERS, 1)
    gated[layer] = i32("gated")
    thresholds = torch.full((LAYERS, sequences), math.nan)
    thresholds[layer - 1] = torch.tensor(values["threshold"])
    return instruction(
        "skip_gate",
        row_mask=i32("row_mask"),
        run_ffn=run_ffn,
        skip_remaining=i32("skip_remaining"),
        similarity=torch.full((LAYERS, sequences), math.nan),
        # <h, h'>, |h|^2, |h'|^2 in two parts
        similarity_partials=torch.tensor([[[0.5 * s, 2.0, 1.0], [1.5 * s, 2.0, 0.0]] for s in similarities])
        .transpose(0, 1)
        .contiguous(),
        num_generated=i32("num_generated"),
        skipped=i32("skipped"),
        threshold_scale=torch.tensor(values["threshold_scale"]),
        gate_mode=torch.tensor([MODES.index(mode) for mode in values["mode"]], dtype=torch.int32),
        gated=gated,
        first_gated=i32("first_gated"),
        gate_threshold=thresholds,
        gate_span=i32("span"),
        warmup_tokens=i32("warmup"),
        batch_rule=torch.tensor([BATCH_RULES.index(rule) for rule in values["batch_rule"]], dtype=torch.int32),
        gate_probability=torch.tensor(values["probability"]),
        gate_seed=torch.tensor(values["seed"]),
        target_ratio=torch.tensor(values["target_ratio"]),
        ramp_tokens=i32("ramp_tokens"),
        layer=layer,
    )


def runs(ins: Instruction) -> list[int]:
    """run_ffn of the gate's layer, of the decode rows."""
    return ins.tensors["run_ffn"][int(ins.scalars["layer"]), : ins.sizes["num_sequences"]].tolist()


@gates
def test_each_row_skips_where_its_similarity_reaches_the_threshold(run: Any) -> None:
    ins = gate([0.4, 0.5, 0.6, -0.9])
    run(ins)
    assert runs(ins) == [1, 0, 0, 1]
    assert ins.tensors["similarity"][0].tolist() == pytest.approx([0.4, 0.5, 0.6, -0.9])
    assert ins.tensors["similarity"][1:].isnan().all()
    assert ins.tensors["run_ffn"][[0, 2]].all()


@gates
def test_prompt_rows_run_every_ffn(run: Any) -> None:
    ins = gate([0.9, 0.9, 0.9], mode=["similarity", "fixed", "random"])
    run(ins)
    assert runs(ins) == [0, 0, 0]
    assert ins.tensors["run_ffn"][:, 3:].all()


@gates
def test_a_span_counts_down_and_holds_whatever_the_similarity(run: Any) -> None:
    ins = gate([0.9, 0.1, 0.9], span=3, ran=[1, 0, 0], skip_remaining=[0, 2, 0])
    run(ins)
    assert runs(ins) == [0, 0, 1]
    assert ins.tensors["skip_remaining"].tolist() == [2, 1, 0]
    assert ins.tensors["similarity"][0].isnan().tolist() == [False, True, True]
    assert ins.tensors["skipped"].tolist() == [1, 1, 0]


@gates
def test_a_row_in_its_warm_up_runs_but_is_measured(run: Any) -> None:
    ins = gate([0.9, 0.9, 0.9], num_generated=[0, WARMUP - 1, WARMUP])
    run(ins)
    assert runs(ins) == [1, 1, 0]
    assert not ins.tensors["similarity"][0].isnan().any()


@gates
def test_a_finished_row_is_left_alone(run: Any) -> None:
    ins = gate([0.9, 0.9], row_mask=[0, 1])
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


@gates
def test_a_dense_sequence_and_one_that_may_not_skip_here_are_left_alone(run: Any) -> None:
    """What a trigger before an ungated layer left to skip stays for the next gated one."""
    settings: dict[str, Any] = {
        "mode": ["dense", "similarity", "fixed", "random", "similarity"],
        "gated": [1, 0, 0, 0, 0],
        "skip_remaining": [2, 2, 2, 2, 0],
    }
    before, ins = (gate([0.9] * 5, **settings) for _ in range(2))
    run(ins)
    assert runs(ins) == [1] * 5
    assert ins.tensors["skip_remaining"].tolist() == [2, 2, 2, 2, 0]
    for name, tensor in ins.tensors.items():
        assert same_bits(tensor, before.tensors[name]), name


@gates
def test_what_is_left_of_a_span_is_used_at_the_next_gated_layer(run: Any) -> None:
    """Gated at layers 1 and 3 only, a span of two skips these two: the layer between them does not use it up."""
    ins = gate([0.9], span=2)
    run(ins)
    assert ins.tensors["skip_remaining"].tolist() == [1]
    between = gate([0.1], layer=2, gated=0, skip_remaining=1)
    run(between)
    assert runs(between) == [1]
    after = gate([0.1], layer=2, skip_remaining=between.tensors["skip_remaining"].tolist())
    run(after)
    assert runs(after) == [0]
    assert after.tensors["skip_remaining"].tolist() == [0]


@gates
def test_a_gate_in_front_of_the_first_layer_tests_none_before_it(run: Any) -> None:
    ins = gate([0.9] * 3, layer=0, mode=["fixed", "random", "similarity"], gated=[1, 1, 0])
    run(ins)
    assert runs(ins) == [0, 0, 1]
    assert ins.tensors["similarity"].isnan().all()


HIGH, LOW = 0.9, 0.1


@gates
@pytest.mark.parametrize(
    ("rule", "similarities", "settings", "expected"),
    [
        ("all", [HIGH, HIGH, HIGH], {}, [0, 0, 0]),
        ("all", [HIGH, LOW, HIGH], {}, [1, 1, 1]),
        ("all", [HIGH, LOW, HIGH], {"row_mask": [1, 0, 1]}, [0, 1, 0]),  # a finished row has no vote
        ("all", [HIGH, HIGH, HIGH], {"num_generated": [9, 9, WARMUP - 1]}, [1, 1, 1]),  # a row in its warm-up vetoes
        ("all", [HIGH, HIGH], {"num_generated": [9, 0], "row_mask": [1, 0]}, [0, 1]),  # not once it is finished
        ("majority", [HIGH, HIGH, LOW], {}, [0, 0, 0]),
        ("majority", [HIGH, LOW, LOW], {}, [1, 1, 1]),
        ("majority", [HIGH, LOW], {}, [1, 1]),  # half is no majority
        ("majority", [HIGH, HIGH, LOW, LOW], {}, [1, 1, 1, 1]),
        ("majority", [HIGH, HIGH, LOW, LOW], {"row_mask": [1, 1, 1, 0]}, [0, 0, 0, 1]),
        ("majority", [HIGH, HIGH, HIGH], {"num_generated": [9, 9, WARMUP - 1]}, [1, 1, 1]),
        ("majority", [HIGH], {}, [0]),
        # of those that decide together, each has its own threshold, and its own warm-up
        ("all", [HIGH, LOW], {"threshold": [0.5, 0.05]}, [0, 0]),
        ("all", [HIGH, HIGH], {"threshold": [0.5, 0.95]}, [1, 1]),
        ("all", [HIGH, HIGH], {"warmup": [WARMUP, WARMUP + 1]}, [1, 1]),
        # who is dense, fixed or random, or may not skip here, neither votes nor vetoes
        ("all", [HIGH, LOW, HIGH], {"mode": ["similarity", "dense", "similarity"]}, [0, 1, 0]),
        ("all", [HIGH, LOW, HIGH], {"gated": [1, 0, 1]}, [0, 1, 0]),
        ("all", [HIGH, HIGH], {"mode": ["similarity", "fixed"], "warmup": [WARMUP, 9]}, [0, 1]),
        ("majority", [HIGH, LOW, LOW], {"gated": [1, 1, 0]}, [1, 1, 1]),
        ("majority", [HIGH, LOW, HIGH], {"mode": ["similarity", "similarity", "dense"]}, [1, 1, 1]),
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
@pytest.mark.parametrize(
    ("similarities", "settings", "expected"),
    [
        ([HIGH, LOW, HIGH, HIGH, HIGH, LOW, LOW, HIGH], {}, [1, 1, 0, 0, 0, 0, 1, 0]),
        ([HIGH, HIGH, HIGH, LOW, LOW, LOW, HIGH, LOW], {}, [0, 0, 1, 1, 1, 1, 0, 1]),
        # one in its warm-up vetoes its own kind only
        ([HIGH] * 8, {"num_generated": [0] + [9] * 7}, [1, 1, 0, 0, 0, 0, 0, 0]),
        ([HIGH] * 8, {"num_generated": [9] * 5 + [0, 9, 9]}, [0, 0, 1, 1, 1, 1, 0, 0]),
        ([HIGH] * 8, {"num_generated": [9] * 7 + [0]}, [0, 0, 0, 0, 0, 0, 0, 1]),
    ],
)
def test_each_batch_rule_is_a_group_of_its_own(
    run: Any, similarities: list[float], settings: dict, expected: list[int]
) -> None:
    """Two sequences of `all`, four of `majority` and two of `per_row` in one step; none of their votes counts for
    another kind. The spans are each sequence's own."""
    rules = ["all"] * 2 + ["majority"] * 4 + ["per_row"] * 2
    spans = list(range(1, 9))
    ins = gate(similarities, batch_rule=rules, span=spans, **settings)
    run(ins)
    assert runs(ins) == expected
    left = [0 if flag else span - 1 for flag, span in zip(expected, spans, strict=True)]
    assert ins.tensors["skip_remaining"].tolist() == left


@gates
def test_groups_may_lie_scattered_over_the_sequences(run: Any) -> None:
    rules = ["majority", "all", "per_row", "all", "majority", "majority"]
    ins = gate([HIGH, HIGH, LOW, HIGH, LOW, HIGH], batch_rule=rules)
    run(ins)
    assert runs(ins) == [0, 0, 1, 0, 0, 0]
    ins = gate([LOW, HIGH, HIGH, LOW, HIGH, LOW], batch_rule=rules)
    run(ins)
    assert runs(ins) == [1, 1, 0, 1, 1, 1]


HELD: dict[str, Any] = {"target_ratio": 0.5, "ramp_tokens": WARMUP + 1}
"""From the sixth token on, 1.5 skipped FFNs are owed for each token of three layers; the slack is 1.5."""


@gates
@pytest.mark.parametrize(
    ("num_generated", "skipped", "similarity", "expected", "left"),
    [
        # after the gate's token, the tenth, 15 are owed: with as many skipped the threshold holds
        (9, 15, 0.51, 0, 0),
        (9, 15, 0.49, 1, 0),
        # one more is owed of 1.5: the limit on 1 - similarity is 0.5 (1 + 1 / 1.5) = 0.833, and 1 + 1.5 may be skipped
        (9, 14, 0.18, 0, 1),
        (9, 14, 0.15, 1, 0),
        # after the ninth 13.5: half a one ahead, the limit is 0.5 / (1 + 0.5 / 1.5) = 0.375, and one may be skipped
        (8, 14, 0.64, 0, 0),
        (8, 14, 0.61, 1, 0),
        (9, 13, -1.0, 0, 2),  # 1.5 behind or more: always, and three may be skipped
        (9, 16, 1.0, 1, 0),  # one ahead: floor(1.5 - 1) = 0 may be skipped
        (9, 17, 1.0, 1, 0),
    ],
)
def test_a_held_ratio_moves_the_threshold_by_what_is_owed(
    run: Any, num_generated: int, skipped: int, similarity: float, expected: int, left: int
) -> None:
    ins = gate([similarity], span=9, first_gated=2, num_generated=num_generated, skipped=skipped, **HELD)
    run(ins)
    assert runs(ins) == [expected]
    assert ins.tensors["skip_remaining"].tolist() == [left]
    assert ins.tensors["skipped"].tolist() == [skipped + 1 - expected]
    assert ins.tensors["threshold_scale"].tolist() == [1.0]


@gates
def test_the_scale_of_a_held_ratio_moves_at_the_first_gated_layer_only(run: Any) -> None:
    """Three of three layers' FFNs are owed from before (13.5 - 10.5): the scale grows by a quarter, in every sequence
    that holds a ratio, is past its warm-up, and for which this gate is the first."""
    ins = gate(
        [LOW] * 5,
        num_generated=9,
        skipped=[10, 10, 10, 13, 10],
        target_ratio=[0.5, 0.5, 0.0, 0.5, 0.5],
        ramp_tokens=[WARMUP + 1] * 4 + [11],
        first_gated=[1, 2, 1, 1, 1],
        warmup=[WARMUP, WARMUP, WARMUP, WARMUP, 10],
        threshold_scale=[2.0, 2.0, 2.0, 2.0, 2.0],
    )
    run(ins)
    moved = 2.0 * (1 + 0.25 * 0.5 / 3)
    assert ins.tensors["threshold_scale"].tolist() == pytest.approx([2.5, 2.0, 2.0, moved, 2.0], rel=1e-6)
    second = gate([LOW], layer=2, first_gated=2, num_generated=9, skipped=10, **HELD)
    run(second)
    assert second.tensors["threshold_scale"].tolist() == [1.25]


@gates
def test_a_fixed_gate_skips_every_row_past_its_warm_up(run: Any) -> None:
    ins = gate([LOW] * 4, mode="fixed", num_generated=[0, WARMUP - 1, WARMUP, 99], row_mask=[1, 1, 1, 1])
    run(ins)
    assert runs(ins) == [1, 1, 0, 0]
    assert ins.tensors["similarity"].isnan().all()


@gates
def test_a_random_gate_skips_as_often_as_it_is_told(run: Any) -> None:
    skipped = 0
    for step in range(100):
        ins = gate([LOW] * 8, mode="random", probability=0.3, seed=7)
        ins.tensors["num_generated"].copy_(torch.arange(8) + WARMUP + 8 * step)
        run(ins)
        skipped += runs(ins).count(0)
    assert 240 - 52 < skipped < 240 + 52  # four standard deviations of 800 draws


def test_random_draws_are_the_same_in_native_code() -> None:
    for seed in (0, 1, -1, 2**62):
        ins, native = (gate([LOW] * 16, mode="random", probability=0.5, seed=seed) for _ in range(2))
        for each in (ins, native):
            each.tensors["num_generated"].copy_(torch.arange(16) + 3)
        skip_gate(ins)
        run_natively(native)
        assert runs(ins) == runs(native)
        assert runs(ins)[:2] == [1, 1]
        assert 0 < sum(runs(ins)[2:]) < 14


SIDE_BY_SIDE: list[tuple[float, dict[str, Any], int]] = [
    # similarity, settings, whether its FFN runs
    (0.6, {"mode": "dense"}, 1),
    (0.6, {"threshold": 0.55}, 0),
    (0.6, {"threshold": 0.65}, 1),
    (0.6, {"threshold": 0.55, "span": 3}, 0),
    (0.6, {"threshold": 0.65, "span": 3, "ran": 0, "skip_remaining": 2}, 0),
    (0.6, {"threshold": 0.55, "warmup": WARMUP + 1}, 1),
    (0.6, {"threshold": 0.55, "warmup": 0, "num_generated": 0}, 0),
    (0.6, {"threshold": 0.55, "gated": 0}, 1),
    (0.6, {"threshold": 0.65, **HELD, "num_generated": 9, "skipped": 14}, 0),  # 0.4 <= 0.35 (1 + 1 / 1.5)
    (0.6, {"threshold": 0.65, **HELD, "num_generated": 9, "skipped": 15, "first_gated": 2}, 1),
    (0.6, {"mode": "fixed"}, 0),
    (0.6, {"mode": "fixed", "num_generated": 1}, 1),
    (0.6, {"mode": "random", "probability": 1.0}, 0),
    (0.6, {"mode": "random", "probability": 0.0}, 1),
    (0.6, {"mode": "random", "probability": 0.5, "seed": 7}, 1),  # it draws 0.58
    (0.6, {"mode": "random", "probability": 0.5, "seed": -8, "num_generated": 6}, 0),  # it draws 0.11
    (0.6, {"row_mask": 0}, 1),
]


def side_by_side() -> Instruction:
    similarities, settings, _ = zip(*SIDE_BY_SIDE, strict=True)
    return gate(
        list(similarities),
        **{name: [each.get(name, default) for each in settings] for name, default in DEFAULTS.items()},
    )


@gates
def test_every_sequence_has_its_own_policy(run: Any) -> None:
    ins = side_by_side()
    run(ins)
    assert runs(ins) == [expected for _, _, expected in SIDE_BY_SIDE]
    measured = [
        settings.get("mode", "similarity") == "similarity" and not {"gated", "ran", "row_mask"} & settings.keys()
        for _, settings, _ in SIDE_BY_SIDE
    ]
    assert (~ins.tensors["similarity"][0].isnan()).tolist() == measured


@gates
@pytest.mark.parametrize("index", range(len(SIDE_BY_SIDE)))
def test_a_sequence_gets_what_it_gets_alone(run: Any, index: int) -> None:
    similarity, settings, _ = SIDE_BY_SIDE[index]
    together, alone = side_by_side(), gate([similarity], **settings)
    run(together)
    run(alone)
    for name in ("run_ffn", "similarity"):
        assert same_bits(together.tensors[name][:, index], alone.tensors[name][:, 0]), name
    for name in ("skip_remaining", "skipped", "threshold_scale"):
        assert same_bits(together.tensors[name][index : index + 1], alone.tensors[name]), name
