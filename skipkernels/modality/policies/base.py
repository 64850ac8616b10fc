"""The interface of selection policies."""

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
        """What a job gets if all deadlines can be met with it."""
        return demand.options.best(demand.requests)

    def least(self, demand: Demand) -> Split:
        """The cheapest that a job can get."""
        return demand.cheapest

    @abstractmethod
    def select(self, demands: Sequence[Demand], prices: Sequence[float], promised: Sequence[float]) -> list[Split]:
        """One split for each job, so that the cumulated cost up to each job is within its ``budget_ms``.

        Args:
            demands: in order of their deadlines; all of them fit with ``least``.
            prices: time per request, by strategy.
            promised: accuracy, by strategy.
        """
