"""Profiles: bounds, interpolation, pruning."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.modality.errors import JobError, ProfileError, StrategyError
from skipkernels.modality.profile import WORTH, Profile, StrategyProfile, Timing, prune_dominated, wilson_lower_bound
from skipkernels.modality.strategy import Strategy
from tests.modality.profiles import BOTH, entry, profile_of, random_profiles


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_bound_is_the_mean_that_would_just_explain_the_score(score: tuple[int, int]) -> None:
    """The bound p solves mean - p = z sqrt(p (1 - p) / n)."""
    right, samples = score
    bound = wilson_lower_bound(right, samples)
    assert 0.0 <= bound <= right / samples
    distance = 1.6448536269514722 * math.sqrt(bound * (1.0 - bound) / samples)
    assert right / samples - bound == pytest.approx(distance, abs=1e-9)


def test_the_bound_nears_the_mean_with_more_samples() -> None:
    bounds = [wilson_lower_bound(0.7432 * samples, samples) for samples in (10, 100, 1000, 100_000)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(0.7432, abs=0.003)


def test_times_between_profiled_sizes_are_interpolated() -> None:
    profiled = StrategyProfile(
        Strategy(("audio",)), (Timing(4, 7.0, 9.0, 400), Timing(1, 1.0, 2.0, 100), Timing(2, 3.0, 3.0, 200)), 5, 10
    )
    assert [profiled.median_ms(size) for size in (1, 2, 3, 4)] == [1.0, 3.0, 5.0, 7.0]
    assert profiled.p95_ms(3) == 6.0
    assert profiled.peak_memory_bytes(3) == 300
    for size in (0, 5):
        with pytest.raises(ProfileError, match=f"batch size {size} is outside the profiled 1..4"):
            profiled.median_ms(size)


def test_batches_fit_the_memory_budget() -> None:
    profiled = entry("audio", 0.5, 1.0, sizes=(1, 2, 8), request_bytes=100)
    assert profiled.largest_batch(None) == 8
    assert profiled.largest_batch(599) == 5
    assert profiled.largest_batch(600) == 6
    with pytest.raises(ProfileError, match="takes 100 bytes for one request, more than the memory budget of 99"):
        profiled.largest_batch(99)
    with pytest.raises(ProfileError, match="no memory measurements"):
        entry("audio", 0.5, 1.0).largest_batch(1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timings": ()}, "must be distinct and start at 1"),
        ({"timings": (Timing(2, 1.0, 1.0),)}, r"start at 1, got \[2\]"),
        ({"timings": (Timing(1, 1.0, 1.0), Timing(1, 1.0, 1.0))}, "distinct"),
        ({"timings": (Timing(1, 2.0, 1.0),)}, "0 < median_ms <= p95_ms, got 2.0 and 1.0"),
        ({"timings": (Timing(1, math.nan, 1.0),)}, "got nan"),
        ({"timings": (Timing(1, 1.0, math.inf),)}, "got 1.0 and inf"),
        ({"score_sum": 11.0}, "a score of 11.0 over 10 samples"),
        ({"score_sum": math.nan}, "a score of nan"),
        ({"samples": 0}, "over 0 samples"),
    ],
)
def test_an_impossible_measurement_is_refused(settings: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"timings": (Timing(1, 1.0, 1.0),), "score_sum": 5.0, "samples": 10}
    with pytest.raises(ProfileError, match=message):
        StrategyProfile(Strategy(("audio",)), **{**good, **settings})


@given(random_profiles(most=6))
def test_what_is_pruned_is_dominated_and_what_is_kept_is_not(profile: Profile) -> None:
    def dominates(one: StrategyProfile, other: StrategyProfile, size: int, worth: float = 0.0) -> bool:
        saved = one.median_ms(size) * (1.0 - worth) <= other.median_ms(size)
        return saved and one.promised_accuracy >= other.promised_accuracy

    found = []
    for size in range(1, 5):
        kept = prune_dominated(profile.strategies, size)
        for other in profile.strategies:
            assert other in kept or any(dominates(one, other, size, WORTH) for one in kept)
            assert other not in kept or not any(dominates(one, other, size) for one in kept if one is not other)
        found += kept
    kept = prune_dominated(profile.strategies)
    assert {one.strategy for one in kept} == {one.strategy for one in found}, "batches may be of any size"
    assert [one.promised_accuracy for one in kept] == sorted((one.promised_accuracy for one in kept), reverse=True)


def test_accuracy_is_not_given_away_for_what_may_be_noise() -> None:
    dense = entry("audio", 0.9, 100.0, batch_ms=0.0)
    for ms, kept in ((98.0, [dense]), (95.0, [dense, None])):
        cheaper = entry("audio@0.5", 0.5, ms, batch_ms=0.0)
        assert prune_dominated([cheaper, dense]) == [one or cheaper for one in kept]


def test_a_strategy_that_is_smaller_in_memory_is_kept() -> None:
    small = entry("audio@0.5", 0.5, 3.0, request_bytes=10)
    for request_bytes, kept in ((99, 2), (10, 1)):
        better = entry("audio", 0.6, 2.0, request_bytes=request_bytes)
        assert prune_dominated([small, better]) == [better, small][:kept]


def test_requests_use_the_strategies_of_their_modalities() -> None:
    profile = profile_of(
        entry("audio+video", 0.9, 10), entry("audio", 0.7, 2), entry("video", 0.6, 3), entry("audio@0.5", 0.95, 1)
    )
    names = [one.strategy.name for one in profile.frontier(("audio", "video"))]
    assert names == ["audio@0.5"]
    assert profile.full(("audio", "video")).strategy.name == "audio+video@0"
    assert profile.full(("audio",)).strategy.name == "audio@0"
    assert [one.strategy.name for one in profile.frontier(("video", "text"))] == ["video@0"]
    with pytest.raises(JobError, match=r"nothing runs on text alone; this model takes audio, audio\+video, video"):
        profile.usable(("text",))


def test_a_strategy_is_looked_up_by_itself() -> None:
    profile = profile_of(entry("audio", 0.7, 2))
    assert profile[Strategy(("audio",))].accuracy == pytest.approx(0.7)
    with pytest.raises(StrategyError, match="video@0 is not in the profile; it holds audio@0"):
        profile[Strategy(("video",))]


@pytest.mark.parametrize("what", ["fingerprint", "device", "dtype"])
def test_another_models_profile_is_refused(what: str) -> None:
    profile = profile_of(entry("audio", 0.7, 2))
    model = {"name": "toy", "fingerprint": "toy-1", "device": "cpu", "dtype": "fp32"}
    offered = (Strategy(("audio",)),)
    profile.check(SimpleNamespace(**model, strategies=offered))  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match=f"for {what} {model[what]}, this model's is other"):
        profile.check(SimpleNamespace(**{**model, what: "other"}, strategies=offered))  # type: ignore[arg-type]
    with pytest.raises(ProfileError, match="holds audio@0, which toy does not offer"):
        profile.check(SimpleNamespace(**model, strategies=()))  # type: ignore[arg-type]


def test_a_profile_holds_each_strategy_once() -> None:
    with pytest.raises(ProfileError, match="each once"):
        profile_of(entry("audio", 0.7, 2), entry("audio", 0.8, 2))
    with pytest.raises(ProfileError, match="at least one"):
        profile_of()


def with_kl(name: str, accuracy: float, kl: float | None) -> StrategyProfile:
    """The more is left out, the less time it takes."""
    return replace(entry(name, accuracy, 2.0 - Strategy.parse(name).skip_level, batch_ms=0.0), kl=kl)


def test_the_largest_saving_within_a_divergence() -> None:
    profile = profile_of(
        with_kl("audio+video", 0.9, None), with_kl("audio+video@0.1", 0.8, 0.02), with_kl("audio+video@0.3", 0.5, 0.2)
    )
    for max_kl, level in ((0.0, 0.0), (0.0199, 0.0), (0.02, 0.1), (0.19, 0.1), (5.0, 0.3)):
        assert profile.level_within(BOTH, max_kl) == level, "dense it is 0, whatever was measured"
    assert profile.level_within(BOTH, 5.0, min_accuracy=0.7) == 0.1
    assert profile.level_within(BOTH, 5.0, skip_level=0.1) == 0.1
    with pytest.raises(JobError, match=r"max_kl 0.01 nats; .* 0.1: 0.02"):
        profile.level_within(BOTH, 0.01, skip_level=0.1)


def test_a_divergence_that_was_not_measured_is_within_none() -> None:
    profile = profile_of(with_kl("audio+video", 0.9, None), with_kl("audio+video@0.1", 0.8, None))
    assert profile.level_within(BOTH, 100.0) == 0.0
    with pytest.raises(JobError, match=r"0.1: not measured"):
        profile.level_within(BOTH, 100.0, skip_level=0.1)
