"""A strategy that saves no time is not chosen, whoever measured it and whenever: with as many requests as share the
steps now, it takes 3 % less than any that promises more, or it is no candidate. Asked for by its level, it runs."""

import math
from dataclasses import replace

import pytest

from skipkernels.modality.arrival import Arrival
from skipkernels.modality.clock import VirtualClock
from skipkernels.modality.job import Job, Request
from skipkernels.modality.profile import Profile, StrategyProfile, Timing
from skipkernels.modality.scheduler import Scheduler
from skipkernels.modality.simulator import simulate
from skipkernels.modality.step_times import StepTimes
from skipkernels.modality.strategy import Strategy
from skipkernels.modality.ticket import Batch
from tests.modality.profiles import profile_of

SLOTS = 16
DENSE = {1: 476.0, 4: 983.0, 16: 3918.0}
SLOWER = {1: 542.0, 4: 971.0, 16: 4633.0}  # as measured: Q4_1 on two cores
NOISY = SLOWER | {4: 900.0}
CROWDED_ONLY = SLOWER | {16: 3700.0}
ALONE_ONLY = {1: 400.0, 4: 980.0, 16: 4000.0}


def timed(name: str, accuracy: float, times: dict[int, float]) -> StrategyProfile:
    timings = tuple(Timing(size, ms, ms) for size, ms in times.items())
    return StrategyProfile(Strategy.parse(name), timings, accuracy * 96, 96, exact=accuracy == 1.0, kl=0.03)


def profile_with(times: dict[int, float]) -> Profile:
    return profile_of(timed("text@0", 1.0, DENSE), timed("text@0.2", 0.23, times))


def levels(entries: list[StrategyProfile]) -> list[float]:
    return [entry.strategy.skip_level for entry in entries]


@pytest.mark.parametrize(
    ("times", "offered_at", "beside"),
    [
        (SLOWER, (), {}),
        (NOISY, (4,), {4: [0.0, 0.2]}),
        (ALONE_ONLY, (1,), {1: [0.0, 0.2]}),
        ({1: 462.0, 4: 954.0, 16: 3801.0}, (), {}),  # 2.9 %
        ({1: 461.0, 4: 953.0, 16: 3800.0}, (1, 4, 16), {1: [0.0, 0.2], 4: [0.0, 0.2], 16: [0.0, 0.2]}),
    ],
)
def test_what_saves_too_little_is_no_candidate(
    times: dict[int, float], offered_at: tuple[int, ...], beside: dict[int, list[float]]
) -> None:
    profile = profile_with(times)
    for sharing in (1, 4, 16, 32):
        expected = beside.get(min(sharing, 16), [0.0])
        assert levels(profile.frontier(("text",), sharing=sharing)) == expected
    assert levels(profile.frontier(("text",))) == ([0.0, 0.2] if offered_at else [0.0])
    dense, skipping = profile.strategies
    assert profile.offered_at(dense) == (1, 4, 16)
    assert profile.offered_at(skipping) == offered_at
    assert levels(profile.frontier(("text",), 0.2, sharing=1)) == [0.2], "who asks for it gets it"


def one(deadline_ms: float = math.inf, work: float = 1.0, **asked: float) -> Job:
    return Job([Request({"text": 0}, work, prompt_tokens=8, new_tokens=8)], deadline_ms, **asked)


def started(scheduler: Scheduler, slot: int) -> Batch:
    batch = scheduler.next_batch(slot)
    assert batch is not None
    return batch


def scheduler_of(profile: Profile) -> Scheduler:
    return Scheduler(profile, VirtualClock(), "cheapest", workers=SLOTS, slots=SLOTS)


@pytest.mark.parametrize("times", [SLOWER, NOISY, CROWDED_ONLY])
def test_a_hurried_request_takes_no_level_that_is_slower(times: dict[int, float]) -> None:
    scheduler = scheduler_of(profile_with(times))
    scheduler.submit(one(10.0))
    assert started(scheduler, 0).strategy.skip_level == 0.0
    scheduler.submit(one(10.0, max_kl=1.0))
    assert started(scheduler, 1).strategy.skip_level == 0.0, "within a divergence, too, only what saves time is taken"
    scheduler.submit(one(10.0, skip_level=0.2))
    assert started(scheduler, 2).strategy.skip_level == 0.2


def test_what_shares_the_steps_now_decides() -> None:
    """It saves time alone, and none beside three others: one that waited while they came takes it no more."""
    scheduler = scheduler_of(profile_with(ALONE_ONLY))
    scheduler.submit(one(10.0))
    assert started(scheduler, 0).strategy.skip_level == 0.2
    scheduler = scheduler_of(profile_with(ALONE_ONLY))
    waiting = scheduler.submit(one(10.0))
    for slot in range(3):
        scheduler.submit(one(5.0, work=100.0, skip_level=0.0))
        assert waiting.demand.requests
        started(scheduler, slot)
    assert started(scheduler, 3).strategy.skip_level == 0.0


def test_a_running_request_is_not_moved_to_what_is_slower() -> None:
    """Nor where its own measured times say that it has become cheap."""
    for times, moved in ((SLOWER, False), ({size: ms / 2 for size, ms in DENSE.items()}, True)):
        clock = VirtualClock()
        scheduler = Scheduler(profile_with(times), clock, workers=SLOTS, slots=SLOTS)
        scheduler.submit(one(500.0))
        batch = started(scheduler, 0)
        for _ in range(50):
            scheduler.latency.observe_factor(1, 0.5)
            scheduler.latency.observe_factor(0, 2.0)
        assert scheduler.latency.batch_ms[1][1] < scheduler.latency.batch_ms[0][1]
        clock.advance_to(1.0)
        assert scheduler.review() == ([batch] if moved else [])


@pytest.mark.parametrize("steps", [False, True])
def test_the_simulator_follows_the_rule(steps: bool) -> None:
    """Requests come one by one. Only sixteen at once would be faster with it."""
    profile = profile_with(CROWDED_ONLY)
    if steps:
        known = StepTimes(((1, 59.0), (16, 490.0)), 0, 0.0, 1.0, 4.0)
        profile = replace(profile, strategies=tuple(replace(entry, steps=known) for entry in profile.strategies))
    arrivals = [Arrival(700.0 * number, one(300.0)) for number in range(40)]
    outcomes = simulate(arrivals, profile, "cheapest", workers=SLOTS, slots=SLOTS)
    answers = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    assert len(answers) == 40
    assert {answer.answers[0].strategy.skip_level for answer in answers} == {0.0}
