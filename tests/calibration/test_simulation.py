"""The skip rule on recorded similarities against a literal rendering of it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.calibration.simulation import rank, simulate, tuned
from skipkernels.skipping.policy import SkipPolicy

LAYERS = 12


def similarities(positions: int = 200, seed: int = 0) -> np.ndarray:
    """Higher in the middle layers, different at every position."""
    rng = np.random.default_rng(seed)
    middle = 0.9 + 0.09 * np.sin(np.linspace(0, np.pi, LAYERS))
    return (middle + rng.normal(0, 0.02, (positions, LAYERS))).clip(-1, 1).astype(np.float32)


def change(rows: np.ndarray) -> np.ndarray:
    """A block costs what it changes."""
    return 1 - rows


def literal(row: np.ndarray, policy: SkipPolicy) -> list[bool]:
    """One token, as ffn-skipllm's description reads."""
    skipped = [False] * LAYERS
    layer = policy.first_dense_layers
    while layer < LAYERS - policy.last_dense_layers:
        if row[layer] >= policy.threshold:
            end = LAYERS - policy.last_dense_layers
            last = end if policy.span is None else min(end, layer + 1 + policy.span)
            for following in range(layer + 1, last):
                skipped[following] = True
            layer = last
        else:
            layer += 1
    return skipped


policies = st.builds(
    SkipPolicy,
    threshold=st.floats(0.85, 1.0),
    span=st.none() | st.integers(1, 5),
    first_dense_layers=st.integers(0, 5),
    last_dense_layers=st.integers(0, 5),
)


@given(policies)
def test_simulation_is_the_rule_taken_literally(policy: SkipPolicy) -> None:
    rows = similarities(50)
    assert simulate(rows, policy).tolist() == [literal(row, policy) for row in rows]


@given(policies)
def test_reachable_is_what_the_lowest_threshold_skips(policy: SkipPolicy) -> None:
    everything = replace(policy, threshold=-1.0)
    assert everything.reachable_ratio(LAYERS) == pytest.approx(simulate(similarities(1), everything).mean())


@pytest.mark.parametrize("span", [None, 1, 3])
def test_the_threshold_gives_the_ratio(span: int | None) -> None:
    rows = similarities()
    policy = tuned(rows, SkipPolicy(threshold=-0.5, span=span), 0.3)
    assert simulate(rows, policy).mean() == pytest.approx(0.3, abs=0.005)
    assert simulate(rows, policy).mean() <= 0.3


def test_thresholds_per_layer_move_together() -> None:
    rows, before = similarities(), (0.9, -1.0, 1.0, 0.95, *[0.97] * 8)
    after = tuned(rows, SkipPolicy(span=2, layer_thresholds=before), 0.25).layer_thresholds
    assert after is not None
    assert simulate(rows, SkipPolicy(span=2, layer_thresholds=after)).mean() == pytest.approx(0.25, abs=0.005)
    factors = [(1 - new) / (1 - old) for old, new in zip(before, after, strict=True) if -1 < old < 1]
    assert factors == pytest.approx([factors[0]] * 10, rel=1e-4)  # thresholds are rounded to 1e-7
    assert after[2] == 1.0


def test_a_ratio_out_of_reach_makes_every_test_pass() -> None:
    rows = similarities()
    assert tuned(rows, SkipPolicy(span=1), 0.9).threshold == -1.0
    assert simulate(rows, tuned(rows, SkipPolicy(span=1, layer_thresholds=(0.9,) * LAYERS), 0.9)).mean() == 5 / LAYERS


def test_rank_prefers_windows_where_the_similarity_is_high() -> None:
    policies = [SkipPolicy(first_dense_layers=start, last_dense_layers=end) for start, end in ((0, 6), (3, 3), (5, 1))]
    best, *_ = rank(similarities(), change(similarities()), policies, 0.3)
    assert (best.first_dense_layers, best.last_dense_layers) == (3, 3)


def test_rank_drops_what_cannot_reach_the_ratio_and_what_is_the_same() -> None:
    rows = similarities()
    wide, narrow, other = SkipPolicy(span=1), SkipPolicy(span=1, first_dense_layers=8), SkipPolicy(span=2)
    ranked = rank(rows, change(rows), [wide, wide, narrow, other], 0.4)
    assert sorted(policy.span for policy in ranked) == [1, 2]


def test_rank_keeps_a_set_of_layers_that_all_but_reaches_the_ratio() -> None:
    fixed = SkipPolicy(first_dense_layers=4, last_dense_layers=4)  # layers 5, 6 and 7: 0.25
    assert rank(similarities(), change(similarities()), [fixed], 0.255)[0].threshold == -1.0
    assert rank(similarities(), change(similarities()), [fixed], 0.27) == []


def test_rank_does_not_prefer_what_misses_the_ratio() -> None:
    """Of two policies that leave out as much per skipped FFN, the one that skips fewer is no better."""
    rows = np.full((100, LAYERS), 0.95, dtype=np.float32)
    rows[:50, 3] = 0.99
    half, whole = (
        SkipPolicy(first_dense_layers=3, last_dense_layers=0),
        SkipPolicy(first_dense_layers=5, last_dense_layers=3),
    )  # 0.33 and 0.25
    assert rank(rows, change(rows), [half, whole], 0.255)[0].first_dense_layers == 5
