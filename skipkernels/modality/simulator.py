"""Runs the scheduler on a virtual clock: hours of load in seconds, with the same decisions as on real workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skipkernels.modality.arrival import Arrival
from skipkernels.modality.clock import VirtualClock
from skipkernels.modality.errors import JobError
from skipkernels.modality.metrics import Outcome
from skipkernels.modality.policies import SelectionPolicy
from skipkernels.modality.profile import Profile
from skipkernels.modality.scheduler import Admission, Scheduler
from skipkernels.modality.shared_steps import SharedSteps
from skipkernels.modality.ticket import Batch, Ticket

_Z95 = 1.645  # of the standard normal


def simulate(
    arrivals: Sequence[Arrival],
    profile: Profile,
    selection: str | SelectionPolicy = "maximize",
    *,
    workers: int = 1,
    slots: int | None = None,
    memory_bytes: float | None = None,
    admission: Admission = "accuracy",
    overhead_ms: float = 0.0,
    seed: int = 0,
) -> list[Outcome]:
    """Simulates all arrivals until every job is done; outcomes are in the order of arrival.

    Batch times are log-normal, with the profile's median and 95th percentile. Where requests share steps whose times
    were profiled, and say how many tokens they have, the steps themselves are simulated. A request is answered
    correctly with the probability of its strategy's measured accuracy, which is above the promised one.

    Args:
        arrivals: in order of their times.
        overhead_ms: time between a decision and the start of its batch, which a real server adds.
        selection, workers, slots, memory_bytes, admission: as in ``Scheduler``.
    """
    scheduling = {"workers": workers, "slots": slots, "memory_bytes": memory_bytes, "admission": admission}
    steps = [entry.steps for entry in profile.strategies if entry.steps is not None]
    counted = all(request.new_tokens > 0 for arrival in arrivals for request in arrival.job.requests)
    if slots is not None and counted and len(steps) == len(profile.strategies):
        return _StepSimulation(profile, selection, scheduling, overhead_ms, seed, -(-workers // slots)).run(arrivals)
    return _Simulation(profile, selection, scheduling, overhead_ms, seed).run(arrivals)


@dataclass(eq=False)
class _Run:
    """A batch on its worker. What it takes is known to the simulation only."""

    batch: Batch
    begins_ms: float  # after the overhead
    factor: float  # what it takes, as a multiple of the profiled time
    done: float = 0.0  # share, as of ``at_ms``
    at_ms: float = 0.0


class _Simulation:
    def __init__(
        self,
        profile: Profile,
        selection: str | SelectionPolicy,
        scheduling: dict[str, Any],
        overhead_ms: float,
        seed: int,
    ) -> None:
        self._clock = VirtualClock()
        self._scheduler = Scheduler(profile, self._clock, selection, **scheduling)
        self._slots: int | None = scheduling["slots"]
        self._overhead_ms = overhead_ms
        self._rng = np.random.default_rng(seed)
        self._free = list(range(scheduling["workers"]))
        self._runs: dict[int, _Run] = {}  # by worker

    def run(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        tickets: list[Ticket | str] = []  # or why it was refused
        while len(tickets) < len(arrivals) or self._runs:
            coming_ms = arrivals[len(tickets)].at_ms if len(tickets) < len(arrivals) else math.inf
            next_run = min(self._runs.values(), key=lambda run: (self._end_ms(run), run.batch.number), default=None)
            if next_run is not None and (end_ms := self._end_ms(next_run)) <= coming_ms:
                self._advance(end_ms)
                batch = next_run.batch
                del self._runs[batch.worker]
                self._scheduler.finish(batch, [self._score(batch) for _ in batch.members])
                self._free.append(batch.worker)
            else:
                self._advance(coming_ms)
                tickets.append(self._submit(arrivals[len(tickets)]))
            self._start_batches()
            self._scheduler.review()
        return [_outcome(arrival, ticket) for arrival, ticket in zip(arrivals, tickets, strict=True)]

    def _advance(self, now_ms: float) -> None:
        """Up to now, the same requests have shared the steps; what comes changes that."""
        for run in self._runs.values():
            run.done += max(0.0, now_ms - max(run.at_ms, run.begins_ms)) / self._whole_ms(run)
            run.at_ms = now_ms
        self._clock.advance_to(now_ms)

    def _submit(self, arrival: Arrival) -> Ticket | str:
        try:
            return self._scheduler.submit(arrival.job)
        except JobError as error:
            return str(error)

    def _start_batches(self) -> None:
        while self._free:
            batch = self._scheduler.next_batch(self._free[-1])
            if batch is None:
                return
            self._free.pop()
            self._begin(batch)

    def _begin(self, batch: Batch) -> None:
        now_ms = self._clock()
        self._runs[batch.worker] = _Run(batch, now_ms + self._overhead_ms, self._factor(batch), at_ms=now_ms)

    def _end_ms(self, run: _Run) -> float:
        return max(run.at_ms, run.begins_ms) + max(0.0, 1.0 - run.done) * self._whole_ms(run)

    def _whole_ms(self, run: _Run) -> float:
        """All of a batch, beside as many as run now."""
        size = len(run.batch.members)
        if self._slots is not None:
            machines = -(-(len(self._runs) + len(self._free)) // self._slots)
            size = -(-len(self._runs) // machines)
        return self._scheduler.latency.profiled_ms(run.batch.index, size) * run.batch.work * run.factor

    def _factor(self, batch: Batch) -> float:
        size = len(batch.members)
        deviation = math.log(batch.profiled.p95_ms(size) / batch.profiled.median_ms(size)) / _Z95
        return math.exp(deviation * self._rng.standard_normal())

    def _score(self, batch: Batch) -> float:
        return float(self._rng.random() < batch.profiled.accuracy)


class _StepSimulation(_Simulation):
    """Of requests whose steps are known."""

    def __init__(
        self,
        profile: Profile,
        selection: str | SelectionPolicy,
        scheduling: dict[str, Any],
        overhead_ms: float,
        seed: int,
        machines: int,
    ) -> None:
        super().__init__(profile, selection, scheduling, overhead_ms, seed)
        self._steps = SharedSteps([entry.steps for entry in profile.strategies if entry.steps is not None], machines)
        self._batches: dict[int, Batch] = {}  # by worker

    def run(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        tickets: list[Ticket | str] = []
        while len(tickets) < len(arrivals) or self._batches:
            coming_ms = arrivals[len(tickets)].at_ms if len(tickets) < len(arrivals) else math.inf
            now_ms = min(coming_ms, self._steps.next_ms())
            self._clock.advance_to(now_ms)
            for worker in self._steps.advance(now_ms):
                batch = self._batches.pop(worker)
                self._scheduler.finish(batch, [self._score(batch)])
                self._free.append(worker)
            if now_ms == coming_ms:
                tickets.append(self._submit(arrivals[len(tickets)]))
            self._start_batches()
            for batch in self._scheduler.review():
                self._steps.move(batch.worker, batch.index)
        return [_outcome(arrival, ticket) for arrival, ticket in zip(arrivals, tickets, strict=True)]

    def _begin(self, batch: Batch) -> None:
        ((ticket, position),) = batch.members
        self._batches[batch.worker] = batch
        order = batch.deadline_ms, batch.number
        self._steps.add(batch.worker, batch.index, ticket.job.requests[position], order, self._overhead_ms)


def _outcome(arrival: Arrival, ticket: Ticket | str) -> Outcome:
    if isinstance(ticket, str):
        return Outcome(arrival.at_ms, arrival.job, None, ticket)
    assert ticket.answer is not None, "a simulated worker never fails"
    scores = tuple(answer.output for answer in ticket.answer.answers)
    return Outcome(arrival.at_ms, arrival.job, ticket.answer, scores=scores)
