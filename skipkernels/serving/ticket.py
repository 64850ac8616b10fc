"""An accepted job on its way: what of it waits, runs, is answered."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from skipkernels.serving.job import Answer, Job, JobAnswer
from skipkernels.serving.profile import StrategyProfile
from skipkernels.serving.strategy import Inputs, Strategy


@dataclass(eq=False)
class Ticket:
    """Made by ``Scheduler.submit``. Done once ``answer`` or ``failure`` is set, never both."""

    job: Job
    number: int  # in order of arrival
    arrival_ms: float
    waiting: deque[int]  # positions of the job's requests that no batch holds
    answers: list[Answer | None]
    promised_sum: float = 0.0  # over the requests that run or are answered
    attempts: dict[int, int] = field(default_factory=dict)  # position -> batches that failed with it
    answer: JobAnswer | None = None
    failure: str | None = None

    @property
    def deadline_ms(self) -> float:
        """On the scheduler's clock; infinity: none."""
        return self.arrival_ms + self.job.deadline_ms

    @property
    def done(self) -> bool:
        return self.answer is not None or self.failure is not None


@dataclass(frozen=True, eq=False)
class Batch:
    """What a worker runs next. From its start on, its requests and their strategy are settled."""

    number: int
    worker: int
    profiled: StrategyProfile
    members: tuple[tuple[Ticket, int], ...]  # a ticket and the position of one of its requests
    started_ms: float
    expected_ms: float  # duration

    @property
    def strategy(self) -> Strategy:
        return self.profiled.strategy

    @property
    def inputs(self) -> list[Inputs]:
        return [ticket.job.requests[position].inputs for ticket, position in self.members]
