"""Moves a queue step by step from the most accurate strategies to cheaper ones; used by ``random`` and ``maximize``."""

from __future__ import annotations

from collections.abc import Sequence

from skipkernels.modality.demand import Demand
from skipkernels.modality.ladder import Hull, Ladder
from skipkernels.modality.optimiser import Split
from skipkernels.modality.strategy_options import StrategyOptions, cost_ms


class Descent:
    """Jobs enter in order of their deadlines and move down rung by rung. ``used_ms`` is their total time."""

    def __init__(self, prices: Sequence[float], promised: Sequence[float]) -> None:
        self.used_ms = 0.0
        self.ladders: list[Ladder] = []  # by job
        self._prices = prices
        self._promised = promised
        self._hulls: dict[StrategyOptions, Hull] = {}
        self._demands: list[Demand] = []
        self._lowered: dict[int, Split] = {}
        self._landed = 0  # jobs before this one have been through ``land``

    def enter(self, demand: Demand) -> Ladder:
        """The next job, at its most accurate strategy."""
        hull = self._hulls.get(demand.options)
        if hull is None:
            hull = self._hulls[demand.options] = Hull(demand.options.strategies, self._promised, self._prices)
        ladder = Ladder(hull, demand.requests, demand.needed_sum)
        self._demands.append(demand)
        self.ladders.append(ladder)
        self.used_ms += self._prices[hull.rungs[0]] * demand.requests * demand.work
        return ladder

    def land(self) -> None:
        """Gives each job its cheapest split where that is cheaper than the lowest rung: it need not lie on the hull. To
        be called when no job has steps left."""
        for job in range(self._landed, len(self.ladders)):
            demand = self._demands[job]
            saved_ms = cost_ms(self.ladders[job].split(), self._prices) - cost_ms(demand.cheapest, self._prices)
            if saved_ms > 0:
                self._lowered[job] = demand.cheapest
                self.used_ms -= saved_ms * demand.work
        self._landed = len(self.ladders)

    def splits(self) -> list[Split]:
        splits = [ladder.split() for ladder in self.ladders]
        for job, split in self._lowered.items():
            splits[job] = split
        return splits
