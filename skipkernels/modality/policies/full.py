"""The modality-agnostic baseline: every job keeps all modalities; earliest deadline first."""

from __future__ import annotations

from collections.abc import Sequence

from skipkernels.modality.demand import Demand
from skipkernels.modality.optimiser import Split
from skipkernels.modality.policies.base import SelectionPolicy


class Full(SelectionPolicy):
    name = "full"

    def most(self, demand: Demand) -> Split:
        return demand.options.full(demand.requests, demand.needed_sum)

    def least(self, demand: Demand) -> Split:
        return self.most(demand)

    def select(self, demands: Sequence[Demand], prices: Sequence[float], promised: Sequence[float]) -> list[Split]:
        return [self.most(demand) for demand in demands]
