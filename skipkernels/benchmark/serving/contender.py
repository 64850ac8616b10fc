"""Contenders: selection policies with the strategies that they may choose from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from skipkernels.modality.policies import get_selection_policy
from skipkernels.modality.profile import Profile, StrategyProfile

_DIVIDED = "maximize"  # the policy that is also run on one dimension of the strategies at a time


@dataclass(frozen=True)
class Contender:
    """A selection policy on some of a model's strategies, the full one among them."""

    name: str
    selection: str
    profile: Profile


def contenders(profile: Profile, policies: Sequence[str]) -> list[Contender]:
    """Each policy on all strategies. If these differ in modalities and in skip level, also ``maximize`` on the
    strategies that differ in modalities only, and on those that differ in skip level only.

    Raises:
        StrategyError: no such policy.
    """
    for name in policies:
        get_selection_policy(name)
    full = profile.full(profile.modalities).strategy
    listed = [Contender(name, name, profile) for name in policies]
    dimensions: dict[str, Callable[[StrategyProfile], bool]] = {
        "modalities only": lambda entry: entry.strategy.skip_level == full.skip_level,
        "skipping only": lambda entry: entry.strategy.modalities == full.modalities,
    }
    parts = {name: tuple(filter(belongs, profile.strategies)) for name, belongs in dimensions.items()}
    if _DIVIDED in policies and all(1 < len(part) < len(profile.strategies) for part in parts.values()):
        listed += [Contender(name, _DIVIDED, replace(profile, strategies=part)) for name, part in parts.items()]
    return listed
