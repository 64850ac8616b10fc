"""Contenders on a real server: the same jobs for all, in turns, with outcomes that are scored and simulated."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from skipkernels.benchmark.serving.contender import Contender
from skipkernels.benchmark.serving.server_run import EmbeddedServer, find_capacities, run_contenders
from skipkernels.modality.profile import Profile
from skipkernels.modality.profiler import Sample
from skipkernels.modality.strategy import Inputs, Strategy, all_strategies
from skipkernels.workloads.workload import Workload
from tests.modality.profiles import entry, profile_of

SAMPLES = [Sample({"audio": number, "video": number}, number) for number in range(7)]
WORKLOAD = Workload(size_deviation=2.0, extra_ms=60.0, slack=0.3)


class Sleeper:
    """As long as the profile says; wrong without video on odd numbers."""

    name, fingerprint, device, dtype = "sleeper", "s", "cpu", "fp32"
    modalities: tuple[str, ...] = ("audio", "video")
    strategies: tuple[Strategy, ...] = all_strategies(("audio", "video"))[:2]

    def __init__(self, slower: float = 1.0) -> None:
        self.slower = slower
        self.seen: Counter[int] = Counter()

    def run(self, batch: Sequence[Inputs], strategy: Strategy) -> Sequence[Any]:
        video = "video" in strategy.modalities
        time.sleep(self.slower * (1.0 + len(batch) * (4.0 if video else 1.0)) / 1e3)
        self.seen.update(inputs["audio"] for inputs in batch)
        return [inputs["audio"] if video or inputs["audio"] % 2 == 0 else -1 for inputs in batch]

    def score(self, output: Any, expected: Any) -> float:
        return float(output == expected)


def profile() -> Profile:
    return profile_of(
        entry("audio+video", 1.0, 4.0, batch_ms=1.0, samples=500),
        entry("audio", 4 / 7, 1.0, batch_ms=1.0, samples=500),
    )


FULL, BEST = Contender("full", "full", profile()), Contender("best", "cheapest", profile())


def test_all_meet_the_same_jobs_in_turns() -> None:
    turns: list[str] = []
    rates = [(FULL, 100.0), (BEST, 200.0)]
    server = EmbeddedServer(Sleeper(), SAMPLES)
    trials = run_contenders(server, rates, WORKLOAD, jobs=8, rounds=2, on_turn=turns.append)
    assert turns == ["full", "best", "best", "full"]
    full, best = trials
    assert len(full.real) == len(full.simulated) == len(best.real) == 2
    for slow, fast, same, faster in zip(full.real, best.real, full.simulated, best.simulated, strict=True):
        sizes = [len(outcome.job.requests) for outcome in slow]
        assert sizes == [len(outcome.job.requests) for outcome in fast] == [len(one.job.requests) for one in same]
        first = [[request.inputs for request in outcome.job.requests] for outcome in slow]
        assert first == [[request.inputs for request in outcome.job.requests] for outcome in fast]
        assert [one.at_ms for one in same] == pytest.approx([2.0 * one.at_ms for one in faster])
        assert all(real.at_ms >= one.at_ms - 1.0 for real, one in zip(slow, same, strict=True))  # ms
    assert [len(one.job.requests) for one in full.real[0]] != [len(one.job.requests) for one in full.real[1]]
    assert full.summary.achieved_accuracy == 1.0
    assert full.summary.jobs == full.simulated_summary.jobs == 16
    assert full.summary.lost == best.summary.lost == 0
    assert full.deviations["promised_accuracy"] == 0.0
    expected = full.summary.throughput_per_s / full.simulated_summary.throughput_per_s - 1.0
    assert full.deviations["throughput_per_s"] == expected


def test_samples_are_taken_in_turns() -> None:
    model = Sleeper()
    server = EmbeddedServer(model, SAMPLES)
    make = server.requests()
    assert [make().inputs["audio"] for _ in range(9)] == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    (trial,) = run_contenders(server, [(BEST, 300.0)], WORKLOAD, jobs=30, rounds=1)
    assert sum(model.seen.values()) == sum(len(outcome.job.requests) for outcome in trial.real[0])
    assert max(model.seen.values()) - min(model.seen.values()) <= 1


def test_the_overhead_is_what_the_server_takes_beyond_the_profile() -> None:
    assert 3.0 < EmbeddedServer(Sleeper(slower=2.0), SAMPLES).overhead_ms(profile()) < 15.0  # 5 ms by the profile


def test_a_rate_that_is_not_met_is_lowered() -> None:
    """The model is slower than its profile, so that the simulation's rate is too high for it."""
    server = EmbeddedServer(Sleeper(slower=2.0), SAMPLES)
    stages: list[float] = []
    settings: dict[str, Any] = {"jobs": 15, "rounds": 1, "step": 0.2}
    (kept, lowered) = find_capacities(
        server,
        [(BEST, 10.0), (FULL, 400.0)],
        Workload(size_deviation=1.0, extra_ms=60.0, slack=0.0),
        max_violations=0.3,
        progress=lambda stage, share: stages.append(share),
        **settings,
    )
    assert (kept.contender, kept.requests_per_s) == (BEST, 10.0)
    assert lowered.contender is FULL
    assert lowered.requests_per_s in (pytest.approx(80.0), pytest.approx(16.0), pytest.approx(3.2))
    assert lowered.summary.violation_ratio <= 0.3
    assert stages == sorted(stages)
    (last,) = find_capacities(
        server,
        [(FULL, 4000.0)],
        Workload(size_deviation=1.0, extra_ms=-4.0, slack=0.0),
        max_violations=0.0,
        tries=2,
        **settings,
    )
    assert last.requests_per_s == pytest.approx(800.0)
    assert last.summary.violation_ratio > 0.0
