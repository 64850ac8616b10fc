"""The largest saving within a budget of divergence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skipkernels.calibration.policy_search import Unreachable
from skipkernels.calibration.tuning import CLOSE, KL_EXPONENT, Trial
from skipkernels.errors import PolicyError

FIRST_GUESS = 0.2
"""A saving to begin with."""
_STEPS = 6
_LEAST = 2e-3  # a smaller saving is none
_INSIDE = 0.98  # of a step, so that it ends within the budget rather than at it


@dataclass(frozen=True)
class Affordable:
    """What was found for a budget."""

    largest: Trial | None  # that costs no more than the budget
    cheapest: Trial  # of all that were tried, the smallest divergence

    def required(self, max_kl: float) -> Trial:
        """
        Raises:
            PolicyError: nothing is affordable; the smallest divergence measured is named.
        """
        if self.largest is None:
            tried = self.cheapest.comparison
            raise PolicyError(
                f"no policy was found that costs at most {max_kl:g} nats: the smallest divergence measured is "
                f"{tried.kl:.4g} nats, at {tried.skip_ratio:.1%} of the FFN bytes ({self.cheapest.kind})"
            )
        return self.largest


def largest_within(max_kl: float, try_at: Callable[[float], Trial], first: float, ceiling: float) -> Affordable:
    """Tries savings from ``first`` on, at most ``ceiling``, guided by how divergence grows with them."""
    wanted, tried = min(first, ceiling), [try_at(min(first, ceiling))]
    for _ in range(_STEPS - 1):
        last = tried[-1]
        following = min(ceiling, wanted * scale(max_kl, last.comparison.kl))
        if following < _LEAST or (last.comparison.kl <= max_kl and following - wanted <= CLOSE):
            break
        wanted = following
        try:
            tried.append(try_at(wanted))
        except Unreachable:  # less than one block, for instance
            break
    within = [trial for trial in tried if trial.comparison.kl <= max_kl and trial.comparison.skip_ratio > 0]
    return Affordable(
        max(within, key=lambda trial: trial.comparison.skip_ratio, default=None),
        min(tried, key=lambda trial: trial.comparison.kl),
    )


def scale(max_kl: float, kl: float) -> float:
    """The factor on a saving of divergence ``kl`` that brings it just below ``max_kl``."""
    return min(2.0, _INSIDE * float((max_kl / max(kl, 1e-6)) ** (1 / KL_EXPONENT)))
