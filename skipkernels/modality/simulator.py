"""Runs the scheduler on a virtual clock: hours of load in seconds, with the same decisions as on real workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush

import numpy as np

from skipkernels.modality.arrival import Arrival
from skipkernels.modality.clock import VirtualClock
from skipkernels.modality.errors import JobError
from skipkernels.modality.metrics import Outcome
from skipkernels.modality.policies import SelectionPolicy
from skipkernels.modality.profile import Profile
from skipkernels.modality.scheduler import Admission, Scheduler
from skipkernels.modality.ticket import Batch, Ticket

_Z95 = 1.645  # of the standard normal


def simulate(
    arrivals: Sequence[Arrival],
    profile: Profile,
    selection: str | SelectionPolicy = "maximize",
    *,
    workers: int = 1,
    memory_bytes: float | None = None,
    admission: Admission = "accuracy",
    overhead_ms: float = 0.0,
    seed: int = 0,
) -> list[Outcome]:
    """Simulates all arrivals until every job is done; outcomes are in the order of arrival.

    Batch times are log-normal, with the profile's median and 95th percentile. A request is answered correctly with the
    probability of its strategy's measured accuracy, which is above the promised one.

    Args:
        arrivals: in order of their times.
        overhead_ms: time between a decision and the start of its batch, which a real server adds.
        selection, workers, memory_bytes, admission: as in ``Scheduler``.
    """
    return _Simulation(profile, selection, workers, memory_bytes, admission, overhead_ms, seed).run(arrivals)


class _Simulation:
    def __init__(
        self,
        profile: Profile,
        selection: str | SelectionPolicy,
        workers: int,
        memory_bytes: float | None,
        admission: Admission,
        overhead_ms: float,
        seed: int,
    ) -> None:
        self._clock = VirtualClock()
        self._scheduler = Scheduler(
            profile, self._clock, selection, workers=workers, memory_bytes=memory_bytes, admission=admission
        )
        self._overhead_ms = overhead_ms
        self._rng = np.random.default_rng(seed)
        self._free = list(range(workers))
        self._ends: list[tuple[float, int, Batch]] = []

    def run(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        tickets: list[Ticket | str] = []  # or why it was refused
        while len(tickets) < len(arrivals) or self._ends:
            coming_ms = arrivals[len(tickets)].at_ms if len(tickets) < len(arrivals) else math.inf
            if self._ends and self._ends[0][0] <= coming_ms:
                end_ms, _, batch = heappop(self._ends)
                self._clock.advance_to(end_ms)
                self._scheduler.finish(batch, [self._score(batch) for _ in batch.members])
                self._free.append(batch.worker)
            else:
                self._clock.advance_to(coming_ms)
                tickets.append(self._submit(arrivals[len(tickets)]))
            self._start_batches()
        return [_outcome(arrival, ticket) for arrival, ticket in zip(arrivals, tickets, strict=True)]

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
            heappush(self._ends, (self._clock() + self._overhead_ms + self._batch_ms(batch), batch.number, batch))

    def _batch_ms(self, batch: Batch) -> float:
        size = len(batch.members)
        median_ms = batch.profiled.median_ms(size)
        deviation = math.log(batch.profiled.p95_ms(size) / median_ms) / _Z95
        return median_ms * batch.work * math.exp(deviation * self._rng.standard_normal())

    def _score(self, batch: Batch) -> float:
        return float(self._rng.random() < batch.profiled.accuracy)


def _outcome(arrival: Arrival, ticket: Ticket | str) -> Outcome:
    if isinstance(ticket, str):
        return Outcome(arrival.at_ms, arrival.job, None, ticket)
    assert ticket.answer is not None, "a simulated worker never fails"
    scores = tuple(answer.output for answer in ticket.answer.answers)
    return Outcome(arrival.at_ms, arrival.job, ticket.answer, scores=scores)
