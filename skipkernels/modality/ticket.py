"""The state of an accepted job: which requests wait, run, or are answered."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from skipkernels.modality.demand import Demand
from skipkernels.modality.job import Answer, Job, JobAnswer
from skipkernels.modality.profile import StrategyProfile
from skipkernels.modality.strategy import Inputs, Strategy
from skipkernels.modality.strategy_options import StrategyOptions


class Ticket:
    """Made by ``Scheduler.submit``. Done once ``answer`` or ``failure`` is set, never both."""

    def __init__(self, job: Job, number: int, arrival_ms: float, options: StrategyOptions) -> None:
        self.job = job
        self.number = number  # in order of arrival
        self.arrival_ms = arrival_ms
        self.answer: JobAnswer | None = None
        self.failure: str | None = None
        self.answers: list[Answer | None] = [None] * len(job.requests)
        self.unanswered = len(job.requests)
        self.promised_sum = 0.0  # over the requests that have a strategy
        self._waiting = deque(range(len(job.requests)))  # positions of those that have none yet
        self.demand = Demand(
            requests=len(job.requests),
            needed_sum=job.min_accuracy * len(job.requests),
            work=max(request.work for request in job.requests),
            deadline_ms=arrival_ms + job.deadline_ms,
            options=options,
        )

    @property
    def done(self) -> bool:
        return self.answer is not None or self.failure is not None

    def take(self, count: int, promised_accuracy: float) -> list[int]:
        """Assigns a strategy of that accuracy to ``count`` waiting requests, and returns their positions."""
        taken = [self._waiting.popleft() for _ in range(count)]
        self.promised_sum += count * promised_accuracy
        self.demand.remain(len(self._waiting), self.demand.needed_sum - count * promised_accuracy)
        return taken


@dataclass(eq=False)
class Batch:
    """What a worker runs. Its requests are fixed from its start on; so is its strategy, unless it is one request among
    others that share their steps (``Scheduler.review``)."""

    number: int
    worker: int
    index: int  # of the strategy in the profile
    profiled: StrategyProfile
    members: tuple[tuple[Ticket, int], ...]  # a ticket and the position of one of its requests
    started_ms: float
    expected_ms: float  # duration
    retry: bool
    spent: float = 0.0  # of a request that shares steps: time so far, as a multiple of what was profiled for all of it
    moved: bool = False  # its strategy was changed on the way

    @property
    def strategy(self) -> Strategy:
        return self.profiled.strategy

    @property
    def inputs(self) -> list[Inputs]:
        return [ticket.job.requests[position].inputs for ticket, position in self.members]

    @property
    def deadline_ms(self) -> float:
        """The earliest, on the scheduler's clock."""
        return min(ticket.demand.deadline_ms for ticket, _ in self.members)

    @property
    def work(self) -> float:
        """Of the largest request."""
        return max(ticket.job.requests[position].work for ticket, position in self.members)
