"""If a job would be late, random requests up to it step down until it is not: the baseline of informed choice."""

from __future__ import annotations

import random
from collections.abc import Sequence

from skipkernels.modality.demand import Demand
from skipkernels.modality.optimiser import Split
from skipkernels.modality.policies.base import SelectionPolicy
from skipkernels.modality.policies.descent import Descent


class Random(SelectionPolicy):
    """Seeded: the same sequence of queues gets the same choices."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def select(self, demands: Sequence[Demand], prices: Sequence[float], promised: Sequence[float]) -> list[Split]:
        descent = Descent(prices, promised)
        movable: list[int] = []  # jobs that may have a step left
        for last, demand in enumerate(demands):
            descent.enter(demand)
            movable.append(last)
            while descent.used_ms > demand.budget_ms and movable:
                index = self._random.randrange(len(movable))
                job = movable[index]
                ladder = descent.ladders[job]
                if ladder.available():
                    descent.used_ms -= ladder.hull.saved_ms[ladder.rung] * demands[job].work
                    ladder.descend(1)
                else:
                    movable[index] = movable[-1]
                    movable.pop()
            if descent.used_ms > demand.budget_ms:
                descent.land()
        return descent.splits()
