"""Selection policies: how strategies are chosen for the waiting jobs. One policy per file."""

from __future__ import annotations

from skipkernels.modality.errors import StrategyError
from skipkernels.modality.policies.base import SelectionPolicy as SelectionPolicy
from skipkernels.modality.policies.cheapest import Cheapest
from skipkernels.modality.policies.full import Full
from skipkernels.modality.policies.maximize import Maximize
from skipkernels.modality.policies.random import Random

POLICIES: dict[str, type[SelectionPolicy]] = {policy.name: policy for policy in (Full, Cheapest, Random, Maximize)}


def get_selection_policy(name: str) -> SelectionPolicy:
    """Raises StrategyError for an unknown name."""
    if name not in POLICIES:
        raise StrategyError(f"unknown selection policy {name!r}; known are {', '.join(POLICIES)}")
    return POLICIES[name]()
