"""Metrics from items, and the bootstrap's intervals where the answer is known."""

import numpy as np
import pytest

from skipkernels.evaluation.estimate import Metric, estimate, estimate_relative

SHARE = Metric("exact match", "share", higher_is_better=True)
PERPLEXITY = Metric("perplexity", "perplexity", higher_is_better=False, exponential=True)


def hits(right: int, asked: int) -> list[tuple[float, float]]:
    return [(float(index < right), 1.0) for index in range(asked)]


def test_the_interval_of_a_share_is_the_binomials() -> None:
    found = estimate(SHARE, hits(300, 400), seed=0)
    assert found.value == 0.75
    spread = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert found.low == pytest.approx(0.75 - spread, abs=0.005)
    assert found.high == pytest.approx(0.75 + spread, abs=0.005)


def test_it_covers_the_truth_nineteen_times_out_of_twenty() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        items = [(float(value), 1.0) for value in rng.normal(3.0, 1.0, 60)]
        found = estimate(SHARE, items, seed)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 3.0 <= found.high
    assert 0.90 <= covered / 200 <= 0.98


def test_the_same_seed_gives_the_same_interval() -> None:
    items = [(float(value), 1.0) for value in np.random.default_rng(1).normal(size=30)]
    assert estimate(SHARE, items, 5) == estimate(SHARE, items, 5)
    assert estimate(SHARE, items, 5) != estimate(SHARE, items, 6)


def test_a_perplexity_is_e_to_the_mean_over_all_tokens() -> None:
    found = estimate(PERPLEXITY, [(2.0, 4.0), (9.0, 6.0)], 0)
    assert found.value == pytest.approx(np.exp(11 / 10))
    assert found.low == pytest.approx(np.exp(0.5))  # both draws the first
    assert found.high == pytest.approx(np.exp(1.5))


def test_all_right_leaves_no_doubt_that_items_could_show() -> None:
    found = estimate(SHARE, hits(20, 20), 0)
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_nothing_counted_is_none() -> None:
    found = estimate(SHARE, [(0.0, 0.0)] * 3, 0)
    assert (found.value, found.low, found.high) == (None, None, None)


def test_relative_to_full_is_resampled_in_pairs() -> None:
    full = [(float(value), 1.0) for value in np.random.default_rng(2).uniform(1, 9, 50)]
    half = [(value / 2, count) for value, count in full]
    found = estimate_relative(SHARE, half, full, 0)
    # every resample has the ratio one half: apart, the interval would be as wide as the items differ
    assert found.value == found.low == found.high == pytest.approx(0.5)


def test_relative_to_nothing_is_none() -> None:
    assert estimate_relative(SHARE, hits(0, 5), hits(0, 5), 0).value is None
