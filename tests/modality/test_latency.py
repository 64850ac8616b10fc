"""Expected batch times: the profile's, until batches tell otherwise."""

import pytest

from skipkernels.modality.errors import ProfileError
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.profile import StrategyProfile, Timing
from skipkernels.modality.strategy import Strategy
from tests.modality.profiles import entry, profile_of, two_speeds


def test_measured_times_take_over() -> None:
    latency = LatencyModel(two_speeds(spread=1.5))
    assert latency.batch_ms[0][4] == 41.0
    for _ in range(40):
        latency.observe(0, 4, 1.0, 82.0)
    assert latency.batch_ms[0][4] == pytest.approx(82.0, rel=1e-3)
    assert latency.batch_ms[0][1] == pytest.approx(22.0, rel=1e-3)
    assert latency.spread_ms[0][4] == pytest.approx(41.0, rel=1e-3)


def test_a_slower_device_shows_in_strategies_that_did_not_run() -> None:
    latency = LatencyModel(two_speeds())
    latency.observe(0, 1, 1.0, 22.0)
    assert 1.0 < latency.factors[1] < latency.factors[0] < 2.0


def test_a_strategy_that_was_slow_once_gets_another_chance() -> None:
    latency = LatencyModel(two_speeds())
    latency.observe(0, 1, 1.0, 1100.0)
    assert latency.factors[0] > 2.0
    for _ in range(100):
        latency.observe(1, 1, 1.0, 3.0)
    assert latency.factors[0] == pytest.approx(1.0, abs=0.05)


def test_one_hiccup_does_not_decide() -> None:
    latency = LatencyModel(two_speeds())
    latency.observe(0, 1, 1.0, 1100.0)  # 100 times too long
    assert latency.factors[0] == pytest.approx(100**0.2)


def test_work_is_not_mistaken_for_slowness() -> None:
    latency = LatencyModel(two_speeds())
    latency.observe(0, 2, 3.0, 63.0)
    assert latency.factors == pytest.approx([1.0, 1.0])


def test_batches_grow_while_that_saves_time() -> None:
    cheap_start, dear_start = (entry("audio", 0.5, 2.0, batch_ms=ms, sizes=range(1, 65)) for ms in (0.01, 20.0))
    assert LatencyModel(profile_of(cheap_start)).batch_limits == [1]
    (limit,) = LatencyModel(profile_of(dear_start)).batch_limits
    per_request = [dear_start.median_ms(size) / size for size in range(1, 65)]
    assert per_request[limit - 1] <= 1.05 * min(per_request) < per_request[limit - 2]


def test_batches_stay_within_memory() -> None:
    profile = profile_of(entry("audio", 0.5, 0.1, request_bytes=100), entry("video", 0.5, 0.1, request_bytes=300))
    latency = LatencyModel(profile, 700)
    assert latency.largest_batches == [7, 2]
    assert all(limit <= largest for limit, largest in zip(latency.batch_limits, latency.largest_batches, strict=True))
    with pytest.raises(ProfileError, match="video@0 takes 300 bytes"):
        LatencyModel(profile, 200)


def test_a_larger_batch_is_never_expected_to_be_faster() -> None:
    timings = (Timing(1, 5.0, 5.0), Timing(2, 4.0, 4.0), Timing(3, 6.0, 6.0))
    latency = LatencyModel(profile_of(StrategyProfile(Strategy(("audio",)), timings, 1, 2)))
    assert latency.batch_ms == [[0.0, 5.0, 5.0, 6.0]]


def test_requests_that_share_batches_are_cheaper() -> None:
    latency = LatencyModel(profile_of(entry("audio", 0.5, 2.0, batch_ms=8.0)))
    assert latency.request_ms(1) == [10.0]
    assert latency.request_ms(4) == [4.0]
    assert latency.batch_limits == [7]  # 22 ms: 3.14 ms a request, where 8 of them would take 3
    assert latency.request_ms(100) == [22.0 / 7]
    assert latency.alone_ms({0: 10}) == 24.0 + 12.0
