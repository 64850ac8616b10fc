"""A waiting job, as the planner sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from skipkernels.modality.optimiser import Split
from skipkernels.modality.strategy_options import StrategyOptions


@dataclass(slots=True, eq=False)
class Demand:
    """The waiting requests of one job. A queue of demands is in order of their deadlines."""

    requests: int
    needed_sum: float  # lower bound on the sum of the promised accuracies of these requests
    work: float
    deadline_ms: float  # on the scheduler's clock
    options: StrategyOptions
    cheapest: Split = field(init=False)
    due_ms: float = 0.0  # the deadline, less the time reserved for jobs that may still arrive
    budget_ms: float = 0.0  # time for all demands up to this one, together

    def __post_init__(self) -> None:
        self.cheapest = self.options.cheapest(self.requests, self.needed_sum)

    def offer(self, options: StrategyOptions) -> None:
        """Other strategies can be chosen from now on."""
        self.options = options
        self.cheapest = options.cheapest(self.requests, self.needed_sum)

    def remain(self, requests: int, needed_sum: float) -> None:
        """After some requests have started."""
        self.requests = requests
        self.needed_sum = needed_sum
        self.cheapest = self.options.cheapest(requests, needed_sum)


def without_hope(budgets_ms: Sequence[float], costs_ms: Sequence[float]) -> set[int]:
    """The fewest jobs to give up so that all others meet their deadlines (Moore and Hodgson, 1968).

    Args:
        budgets_ms: by job, in order of the deadlines: time for all jobs up to this one, together.
        costs_ms: by job.

    Returns:
        Positions of the jobs that will be late.
    """
    given_up = set()
    kept: list[tuple[float, int]] = []  # largest first
    used_ms = 0.0
    for position, (budget_ms, cost_ms) in enumerate(zip(budgets_ms, costs_ms, strict=True)):
        heappush(kept, (-cost_ms, position))
        used_ms += cost_ms
        while kept and used_ms > budget_ms:
            negative_cost_ms, largest = heappop(kept)
            used_ms += negative_cost_ms
            given_up.add(largest)
    return given_up
