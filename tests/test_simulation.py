"""The skip rule on recorded similarities against a literal rendering of it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.policy import SkipPolicy
from skipkernels.simulation import rank, reachable_ratio, simulate, threshold_for, windows

LAYERS = 12


def similarities(positions: int = 200, seed: int = 0) -> np.ndarray:
    """Higher in the middle layers, different at every position."""
    rng = np.random.default_rng(seed)
    middle = 0.9 + 0.09 * np.sin(np.linspace(0, np.pi, LAYERS))
    return (middle + rng.normal(0, 0.02, (positions, LAYERS))).clip(-1, 1).astype(np.float32)


def literal(row: np.ndarray, policy: SkipPolicy) -> list[bool]:
    """One token, as ffn-skipllm's description reads."""
    skipped = [False] * LAYERS
    layer = policy.cold_start
    while layer < LAYERS - policy.cold_end:
        if row[layer] >= policy.threshold:
            end = LAYERS - policy.cold_end
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
    cold_start=st.integers(0, 5),
    cold_end=st.integers(0, 5),
)


@given(policies)
def test_simulation_is_the_rule_taken_literally(policy: SkipPolicy) -> None:
    rows = similarities(50)
    assert simulate(rows, policy).tolist() == [literal(row, policy) for row in rows]


@given(policies)
def test_reachable_is_what_the_lowest_threshold_skips(policy: SkipPolicy) -> None:
    everything = replace(policy, threshold=-1.0)
    assert reachable_ratio(everything, LAYERS) == pytest.approx(simulate(similarities(1), everything).mean())


@pytest.mark.parametrize("span", [None, 1, 3])
def test_the_threshold_gives_the_ratio(span: int | None) -> None:
    rows, policy = similarities(), SkipPolicy(span=span)
    threshold = threshold_for(rows, policy, 0.3)
    assert simulate(rows, replace(policy, threshold=threshold)).mean() == pytest.approx(0.3, abs=0.005)


def test_windows_respect_given_bounds() -> None:
    assert windows(LAYERS, 3, 2) == [(3, 2)]
    assert {start for start, _ in windows(LAYERS, cold_start=3)} == {3}
    assert {end for _, end in windows(LAYERS, cold_end=0)} == {0}


@pytest.mark.parametrize("layers", [2, 3, 12, 24, 80])
def test_every_window_is_possible_and_there_are_few(layers: int) -> None:
    bounds = windows(layers)
    for start, end in bounds:
        SkipPolicy(cold_start=start, cold_end=end).plan(layers)
    assert 1 <= len(bounds) <= 78


def test_rank_prefers_windows_where_the_similarity_is_high() -> None:
    policies = [SkipPolicy(cold_start=start, cold_end=end) for start, end in ((0, 6), (3, 3), (5, 1))]
    best, *_ = rank(similarities(), policies, 0.3)
    assert (best.cold_start, best.cold_end) == (3, 3)


def test_rank_drops_what_cannot_reach_the_ratio_and_what_is_the_same() -> None:
    rows = similarities()
    wide, narrow, other = SkipPolicy(span=1), SkipPolicy(span=1, cold_start=8), SkipPolicy(span=2)
    ranked = rank(rows, [wide, wide, narrow, other], 0.4)
    assert sorted(policy.span for policy in ranked) == [1, 2]
