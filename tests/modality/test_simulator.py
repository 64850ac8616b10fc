"""The simulator against queueing theory, and what holds in every run."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.modality.arrival import Arrival
from skipkernels.modality.job import Job, Request
from skipkernels.modality.metrics import summarise
from skipkernels.modality.profile import Profile
from skipkernels.modality.simulator import simulate
from skipkernels.workloads.arrivals import poisson
from skipkernels.workloads.workload import Workload
from tests.modality.profiles import BOTH, entry, job, profile_of, random_profiles, two_speeds

REQUEST = Request(dict.fromkeys(BOTH, 0))


@pytest.mark.parametrize("workers", [1, 3])
def test_waiting_times_are_those_of_queueing_theory(workers: int) -> None:
    """Single requests, first come first served, each with a service of 10 ms: the recursion of Lindley, and for more
    workers of Kiefer and Wolfowitz, gives every job's waiting time."""
    profile = profile_of(entry("audio+video", 0.9, 9.5, batch_ms=0.5, sizes=(1,)))
    times = poisson(workers * 90.0, 2_000, np.random.default_rng(3))  # 90 % load
    outcomes = simulate([Arrival(float(at), Job([REQUEST])) for at in times], profile, workers=workers)
    ahead_ms = np.zeros(workers)  # work ahead of a newcomer, least first
    for at_ms, before_ms, outcome in zip(times, [0.0, *times], outcomes, strict=False):
        ahead_ms = np.sort(np.maximum(0.0, ahead_ms - (at_ms - before_ms)))
        assert outcome.answer is not None
        assert outcome.answer.time_ms == pytest.approx(ahead_ms[0] + 10.0)
        ahead_ms[0] += 10.0


@given(
    random_profiles(),
    st.sampled_from(["full", "cheapest", "random", "maximize"]),
    st.lists(
        st.tuples(st.floats(0.0, 60.0), st.integers(1, 40), st.floats(0.5, 300.0), st.floats(0.0, 1.0)),
        min_size=1,
        max_size=25,
    ),
    st.integers(1, 3),
    st.sampled_from(["accuracy", "deadline"]),
)
def test_no_job_is_lost_and_no_promise_broken(
    profile: Profile, policy: str, drawn: list[tuple[float, int, float, float]], workers: int, admission: str
) -> None:
    reachable = max(one.promised_accuracy for one in profile.strategies)
    arrivals, at_ms = [], 0.0
    for gap_ms, requests, deadline_ms, share in drawn:
        at_ms += gap_ms
        arrivals.append(Arrival(at_ms, job(requests, deadline_ms, share * reachable)))
    outcomes = simulate(arrivals, profile, policy, workers=workers, admission=admission)  # type: ignore[arg-type]
    assert [outcome.job for outcome in outcomes] == [arrival.job for arrival in arrivals]
    for outcome in outcomes:
        if outcome.answer is None:
            assert admission == "deadline"
            assert outcome.failure
            continue
        promised = [answer.promised_accuracy for answer in outcome.answer.answers]
        assert len(promised) == len(outcome.job.requests)
        assert outcome.answer.promised_accuracy == pytest.approx(sum(promised) / len(promised))
        assert outcome.answer.promised_accuracy >= outcome.job.min_accuracy - 1e-9
        assert outcome.answer.time_ms == max(answer.time_ms for answer in outcome.answer.answers)
        assert outcome.answer.deadline_met is (outcome.answer.time_ms <= outcome.job.deadline_ms)


def test_a_run_can_be_repeated() -> None:
    profile, workload = two_speeds(spread=1.3), Workload()
    rng = np.random.default_rng(0)
    arrivals = workload.arrivals(poisson(20.0, 200, rng), workload.sizes(200, rng), profile)
    first, again, other = (simulate(arrivals, profile, "random", seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_accuracy_comes_out_as_profiled() -> None:
    profile = two_speeds()
    arrivals = [Arrival(1000.0 * number, job(40, 1e6)) for number in range(100)]
    summary = summarise(simulate(arrivals, profile))
    assert summary.achieved_accuracy == pytest.approx(0.9, abs=0.02)  # 4,000 draws: four deviations
    assert summary.promise_kept


def test_overhead_comes_on_top_of_every_batch() -> None:
    profile = two_speeds()
    times = [
        simulate([Arrival(0.0, job(1, 1e6))], profile, overhead_ms=overhead_ms)[0].answer for overhead_ms in (0.0, 2.5)
    ]
    assert [answer.time_ms for answer in times if answer] == [11.0, 13.5]


def test_the_workload_is_the_originals() -> None:
    profile = two_speeds()
    workload = Workload(extra_ms=17.0, slack=0.06)
    sizes = workload.sizes(20_000, np.random.default_rng(0))
    below = 0.5 * (1 + math.erf((1.5 - 1.0) / 6.0 / math.sqrt(2.0)))  # drawn below 1.5 counts as 1
    assert Counter(sizes)[1] / len(sizes) == pytest.approx(below, abs=0.02)
    assert min(sizes) == 1
    (arrival,) = workload.arrivals(np.array([3.0]), [10], profile)
    assert (arrival.at_ms, len(arrival.job.requests)) == (3.0, 10)
    assert arrival.job.deadline_ms == 81.0 + 21.0 + 17.0  # batches of 8 and 2 with everything
    assert arrival.job.min_accuracy == pytest.approx(profile.strategies[0].promised_accuracy - 0.06)
