"""Chooses strategies for all waiting jobs, and checks the choice by simulating the batches; the first can start.

1. Every job gets the most accurate strategy, if all jobs meet their deadlines with that.
2. Else the selection policy chooses within a time budget per job. If a job finishes late in the simulated batches, its
   budget is cut by the overrun and the policy is asked again: how long a job takes depends on the batches it shares,
   which only the simulation shows.
3. If a job would still be late, every job with a deadline takes its cheapest split, so that no job is late for another
   one's accuracy. As few jobs as possible are then given up: they run after the others, but before jobs without a
   deadline. Those keep their most accurate split: they are in nobody's way.

In steps 1 and 2, plans leave room for jobs that may still arrive with earlier deadlines. Batches are kept short,
because a new job has to wait for the running one; if short batches would make jobs late, they may be as large as
profiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from skipkernels.modality.demand import Demand, without_hope
from skipkernels.modality.forecast import Forecast
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.optimiser import Split
from skipkernels.modality.plan import BatchLimits, Plan, lay_out
from skipkernels.modality.policies import SelectionPolicy
from skipkernels.modality.strategy_options import cost_ms

_ROUNDS = 3  # of step 2, at most
_ROUND_JOBS = 256  # jobs times rounds, at most: what takes about 2 ms


class Planner:
    """Decides for a scheduler.

    Args:
        promised: accuracy by strategy.
    """

    def __init__(
        self, selection: SelectionPolicy, latency: LatencyModel, promised: Sequence[float], forecast: Forecast
    ) -> None:
        self._selection = selection
        self._latency = latency
        self._promised = promised
        self._forecast = forecast

    def decide(
        self, demands: Sequence[Demand], late: Sequence[Demand], free_ms: Sequence[float], now_ms: float
    ) -> tuple[Plan, list[int]]:
        """
        Args:
            demands: in order of their deadlines.
            late: jobs whose deadline cannot be met any more.
            free_ms: when each worker is free: now for the one that gets the batch.

        Returns:
            The plan, and the positions of the demands whose deadline cannot be met any more. Positions in the plan
            count through ``demands`` and then ``late``.
        """
        short = BatchLimits(self._latency.batch_limits, self._forecast.patience_ms)
        everyone = [*demands, *late]
        least = [self._least(demand) for demand in everyone]
        if not late:
            plan = self._comfortable(demands, least, free_ms, now_ms, short)
            if plan:
                return plan, []
        for demand in demands:
            demand.budget_ms = _time_ms(demand.deadline_ms, free_ms)
        given_up = without_hope([demand.budget_ms for demand in demands], _costs(demands, least, self._prices(demands)))
        hopeless = [
            position
            for position, demand in enumerate(demands)
            if now_ms + self._at_once_ms(demand, least[position], len(free_ms)) > demand.deadline_ms
        ]
        given_up.update(hopeless)
        in_time = [position for position in range(len(demands)) if position not in given_up]
        timed = sum(demands[position].deadline_ms < math.inf for position in in_time)
        order = [*in_time[:timed], *sorted(given_up), *range(len(demands), len(everyone)), *in_time[timed:]]
        plan = lay_out(everyone, least, order, free_ms, self._latency, short)
        if _missed(plan, demands):
            large = lay_out(everyone, least, order, free_ms, self._latency, BatchLimits(self._latency.largest_batches))
            plan = min(plan, large, key=lambda plan: _missed(plan, demands))
        return plan, hopeless

    def _at_once_ms(self, demand: Demand, least: Split, workers: int) -> float:
        """What a job takes if it begins now and all workers are free for it. A request runs on one of them."""
        return self._latency.alone_ms(least) * demand.work / min(workers, demand.requests)

    def _least(self, demand: Demand) -> Split:
        return self._selection.least(demand) if demand.deadline_ms < math.inf else self._selection.most(demand)

    def late_ms(self, demands: Sequence[Demand], free_ms: Sequence[float]) -> dict[int, float]:
        """Positions of the jobs that would be late if every job took its cheapest split, and by how much."""
        if not demands:
            return {}
        least = [self._least(demand) for demand in demands]
        positions = range(len(demands))
        plans = [
            lay_out(demands, least, positions, free_ms, self._latency, BatchLimits(sizes))
            for sizes in (self._latency.batch_limits, self._latency.largest_batches)
        ]
        best = min(plans, key=lambda plan: _missed(plan, demands))
        return {
            position: end_ms - demand.deadline_ms
            for position, (end_ms, demand) in enumerate(zip(best.end_ms, demands, strict=True))
            if end_ms > demand.deadline_ms
        }

    def _comfortable(
        self,
        demands: Sequence[Demand],
        least: Sequence[Split],
        free_ms: Sequence[float],
        now_ms: float,
        limits: BatchLimits,
    ) -> Plan | None:
        """Steps 1 and 2: a plan that meets all deadlines and leaves room for new jobs; None: there is none."""
        for demand in demands:
            taken_ms = self._forecast.taken_ms(now_ms, demand.deadline_ms)
            demand.due_ms = demand.deadline_ms - taken_ms / len(free_ms)
            demand.budget_ms = _time_ms(demand.due_ms, free_ms)
        prices = self._prices(demands)
        most = [self._selection.most(demand) for demand in demands]
        if _fits(demands, most, prices):
            plan = lay_out(demands, most, range(len(demands)), free_ms, self._latency, limits)
            if not _over(plan, demands):
                return plan
        if not _fits(demands, least, prices):
            return None
        for _ in range(max(1, min(_ROUNDS, _ROUND_JOBS // len(demands)))):
            splits = self._selection.select(demands, prices, self._promised)
            plan = lay_out(demands, splits, range(len(demands)), free_ms, self._latency, limits)
            over = _over(plan, demands)
            if not over:
                return plan
            for position, ms in over:
                demands[position].budget_ms -= ms
        return None

    def _prices(self, demands: Sequence[Demand]) -> list[float]:
        return self._latency.request_ms(max(1, sum(demand.requests for demand in demands)))


def _time_ms(until_ms: float, free_ms: Sequence[float]) -> float:
    """Worker time that is free until then, over all workers."""
    if len(free_ms) == 1:
        return until_ms - free_ms[0]
    return sum(max(0.0, until_ms - free) for free in free_ms)


def _costs(demands: Sequence[Demand], splits: Sequence[Split], prices: Sequence[float]) -> list[float]:
    return [cost_ms(split, prices) * demand.work for split, demand in zip(splits, demands, strict=False)]


def _fits(demands: Sequence[Demand], splits: Sequence[Split], prices: Sequence[float]) -> bool:
    """Whether the cumulated cost up to each job is within its budget."""
    used_ms = 0.0
    for cost, demand in zip(_costs(demands, splits, prices), demands, strict=True):
        used_ms += cost
        if used_ms > demand.budget_ms:
            return False
    return True


def _missed(plan: Plan, demands: Sequence[Demand]) -> int:
    return sum(end_ms > demand.deadline_ms for end_ms, demand in zip(plan.end_ms, demands, strict=False))


def _over(plan: Plan, demands: Sequence[Demand]) -> list[tuple[int, float]]:
    """Positions of the jobs that end after they are due, and by how much."""
    return [
        (position, end_ms - demand.due_ms)
        for position, (end_ms, demand) in enumerate(zip(plan.end_ms, demands, strict=True))
        if end_ms > demand.due_ms
    ]
