"""Requests that join and leave a running step one by one, under the same scheduler, planner and policies."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest

from skipkernels.modality.arrival import Arrival
from skipkernels.modality.clock import VirtualClock
from skipkernels.modality.job import Job, Request
from skipkernels.modality.metrics import summarise
from skipkernels.modality.runtime import Runtime
from skipkernels.modality.scheduler import FAIR_STARTS, Scheduler
from skipkernels.modality.simulator import simulate
from skipkernels.modality.strategy import Inputs, Strategy
from skipkernels.modality.ticket import Batch
from skipkernels.workloads.arrivals import poisson
from tests.modality.profiles import BOTH, entry, profile_of

# n at once take 10 + n ms dense, 5 + n ms with skipping: sharing steps pays
PROFILE = profile_of(
    entry("audio+video", 0.9, 1.0, batch_ms=10.0),
    entry("audio+video@0.3", 0.8, 1.0, batch_ms=5.0),
    entry("audio", 0.7, 1.0, batch_ms=1.0),
)


def one(deadline_ms: float = math.inf, min_accuracy: float = 0.0, work: float = 1.0) -> Job:
    return Job([Request(dict.fromkeys(BOTH, 0), work)], deadline_ms, min_accuracy)


def scheduler_of(clock: VirtualClock, slots: int = 4) -> Scheduler:
    return Scheduler(PROFILE, clock, "maximize", workers=slots, slots=slots)


def start(scheduler: Scheduler, slot: int) -> Batch:
    batch = scheduler.next_batch(slot)
    assert batch is not None
    return batch


def test_a_newcomer_joins_what_runs() -> None:
    clock = VirtualClock()
    scheduler = scheduler_of(clock)
    scheduler.submit(one(work=100.0))
    start(scheduler, 0)
    clock.advance_to(5.0)
    scheduler.submit(one(30.0))
    assert start(scheduler, 1).strategy.skip_level == 0.0
    assert scheduler.next_batch(2) is None


def test_what_runs_beside_it_counts_when_a_strategy_is_chosen() -> None:
    """Alone it would take 11 ms dense, beside three others 14."""
    for others, level in ((0, 0.0), (3, 0.3)):
        clock = VirtualClock()
        scheduler = scheduler_of(clock)
        for slot in range(others):
            scheduler.submit(one(work=100.0))
            start(scheduler, slot)
        scheduler.submit(one(12.5))
        assert start(scheduler, 3).strategy == Strategy(BOTH, level)


def test_a_running_request_in_danger_skips_more_if_its_promise_allows() -> None:
    for min_accuracy, level in ((0.0, 0.3), (0.85, 0.0)):
        clock = VirtualClock()
        scheduler = scheduler_of(clock)
        ticket = scheduler.submit(one(12.0, min_accuracy))
        batch = start(scheduler, 0)
        assert batch.strategy.skip_level == 0.0
        clock.advance_to(3.0)
        for slot in (1, 2, 3):  # others come, each step takes longer now
            scheduler.submit(one(work=100.0))
            start(scheduler, slot)
        moved = scheduler.review()
        assert batch.strategy == Strategy(BOTH, level)  # not audio alone: its prompt is in the cache
        assert moved == ([batch] if level else [])
        assert scheduler.counters.raised_levels == len(moved)
        clock.advance_to(11.0)
        scheduler.finish(batch, ["out"])
        assert ticket.answer is not None
        assert ticket.answer.promised_accuracy == PROFILE[batch.strategy].promised_accuracy >= min_accuracy
        assert ticket.answer.answers[0].strategy == batch.strategy


def test_what_cannot_be_in_time_takes_no_slot_from_what_can() -> None:
    """A request runs in one slot, however many there are: 54 ms of work cannot be done in 40, though eight slots have
    more time than that together. It runs after the other one, whose deadline comes later."""
    slots = 8
    clock = VirtualClock()
    scheduler = scheduler_of(clock, slots)
    for _ in range(slots):
        scheduler.submit(one(work=4.0))
    batches = [start(scheduler, slot) for slot in range(slots)]  # eight at once take 18 ms dense, four times
    hopeless = scheduler.submit(one(100.0, min_accuracy=0.85, work=3.0))
    hopeful = scheduler.submit(one(200.0, min_accuracy=0.85))
    clock.advance_to(60.0)
    for batch, waiting in zip(batches[:2], (hopeful, hopeless), strict=True):
        scheduler.finish(batch, ["out"])
        assert start(scheduler, batch.worker).members[0][0] is waiting


def test_without_a_deadline_nothing_is_lost_for_others_and_nobody_starves() -> None:
    """More requests with deadlines than can be served keep coming; the best-effort one runs all the same, and with the
    most accurate strategy."""
    clock = VirtualClock()
    scheduler = scheduler_of(clock, slots=1)
    patient = scheduler.submit(one())
    for turn in range(FAIR_STARTS):
        for _ in range(2):
            scheduler.submit(one(20.0))
        batch = start(scheduler, 0)
        if batch.members[0][0] is patient:
            assert batch.strategy.skip_level == 0.0
            break
        clock.advance_to(clock() + 30.0)
        scheduler.finish(batch, [turn])
    else:
        pytest.fail("the request without a deadline never started")


def test_slower_steps_are_noticed() -> None:
    clock = VirtualClock()
    scheduler = scheduler_of(clock)
    for _ in range(40):
        scheduler.submit(one())
        batch = start(scheduler, 0)
        clock.advance_to(clock() + 22.0)  # twice the profiled 11 ms
        scheduler.finish(batch, [0])
    assert scheduler.latency.factors[0] == pytest.approx(2.0, rel=0.05)


def test_simulated_requests_share_their_steps() -> None:
    """Four that come at once and run together take what four take together, the last of them alone what is left."""
    arrivals = [Arrival(0.0, one(work=work)) for work in (1.0, 1.0, 1.0, 2.0)]
    outcomes = simulate(arrivals, PROFILE, "full", workers=4, slots=4)
    assert [o.answer.time_ms for o in outcomes if o.answer] == pytest.approx([14.0, 14.0, 14.0, 14.0 + 11.0])


def test_sharing_carries_what_one_after_the_other_cannot() -> None:
    times = poisson(150.0, 600, np.random.default_rng(1))
    arrivals = [Arrival(float(at), one(200.0)) for at in times]
    shared = summarise(simulate(arrivals, PROFILE, "full", workers=4, slots=4))
    serial = summarise(simulate(arrivals, PROFILE, "full", workers=1, slots=1))
    assert shared.violation_ratio < 0.01 < 0.4 < serial.violation_ratio


class Sleeper:
    """A ``SlotWorker`` whose requests take ``ms``; told to move, it remembers."""

    def __init__(self, slots: int, ms: float) -> None:
        self.slots, self.ms = slots, ms
        self.running = self.most = 0
        self.moves: list[Strategy] = []
        self.dropped: list[Inputs] = []

    async def answer(self, inputs: Inputs, strategy: Strategy, deadline_ms: float) -> Any:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.ms / 1e3)
        self.running -= 1
        return strategy

    def move(self, inputs: Inputs, strategy: Strategy) -> None:
        self.moves.append(strategy)

    def drop(self, inputs: Inputs) -> None:
        self.dropped.append(inputs)

    async def recover(self) -> None: ...

    async def close(self) -> None: ...


def test_a_runtime_fills_the_slots_of_its_workers() -> None:
    async def run() -> None:
        workers = [Sleeper(3, 20.0), Sleeper(3, 20.0)]
        async with Runtime(PROFILE, workers) as runtime:
            await asyncio.gather(*(runtime.submit(one()) for _ in range(20)))
        assert [worker.most for worker in workers] == [3, 3]

    asyncio.run(run())


def test_a_caller_that_leaves_frees_its_slot_and_a_late_one_is_moved() -> None:
    async def run() -> None:
        worker = Sleeper(2, 2_000.0)
        async with Runtime(PROFILE, [worker]) as runtime:
            leaves = asyncio.create_task(runtime.submit(one()))
            hurried = asyncio.create_task(runtime.submit(one(150.0, work=10.0)))
            await asyncio.sleep(0.12)
            leaves.cancel()
            await asyncio.sleep(0.01)
            assert len(worker.dropped) == 1
            answer = await hurried
            assert not answer.deadline_met

    asyncio.run(run())
