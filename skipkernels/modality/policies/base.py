"""What every policy answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from skipkernels.modality.demand import Demand
from skipkernels.modality.optimiser import Split


class SelectionPolicy(ABC):
    """Chooses strategies within each job's own accuracy requirement."""

    name: ClassVar[str]

    def most(self, demand: Demand) -> Split:
        """What a job gets when every deadline holds with it."""
        return demand.options.best(demand.requests)

    def least(self, demand: Demand) -> Split:
        """The cheapest that a job can get."""
        return demand.cheapest

    @abstractmethod
    def select(self, demands: Sequence[Demand], prices: Sequence[float], promised: Sequence[float]) -> list[Split]:
        """One split for each job, so that each job and all before it fit its ``budget_ms`` together.

        Args:
            demands: in order of their deadlines; all of them fit with ``least``.
            prices: time per request, by strategy.
            promised: accuracy, by strategy.
        """
