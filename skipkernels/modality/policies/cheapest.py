"""If a job would be late, it and all jobs before it take their cheapest split."""

from __future__ import annotations

from collections.abc import Sequence

from skipkernels.modality.demand import Demand
from skipkernels.modality.optimiser import Split
from skipkernels.modality.policies.base import SelectionPolicy
from skipkernels.modality.strategy_options import cost_ms


class Cheapest(SelectionPolicy):
    name = "cheapest"

    def select(self, demands: Sequence[Demand], prices: Sequence[float], promised: Sequence[float]) -> list[Split]:
        splits: list[Split] = []
        lowered = 0  # jobs before this position take their cheapest
        used_ms = 0.0
        for demand in demands:
            splits.append(self.most(demand))
            used_ms += cost_ms(splits[-1], prices) * demand.work
            if used_ms <= demand.budget_ms:
                continue
            for position in range(lowered, len(splits)):
                cheapest = self.least(demands[position])
                used_ms += (cost_ms(cheapest, prices) - cost_ms(splits[position], prices)) * demands[position].work
                splits[position] = cheapest
            lowered = len(splits)
        return splits
