"""Steps from the most accurate strategy to cheaper ones, least accuracy lost per ms saved first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from skipkernels.modality.optimiser import EPSILON, Split


class Hull:
    """The upper convex hull of accuracy over price, from the most accurate strategy down to the cheapest.

    Each step along it loses more accuracy per ms saved than the step before. A strategy below the hull is never part of
    the best fractional choice (multiple-choice knapsack: Sinha and Zoltners, Operations Research 1979).

    Args:
        strategies: to choose from.
        promised, prices: accuracy and time per request, indexed by strategy.
    """

    def __init__(self, strategies: Sequence[int], promised: Sequence[float], prices: Sequence[float]) -> None:
        def loss(upper: int, lower: int) -> float:
            return (promised[upper] - promised[lower]) / (prices[upper] - prices[lower])

        corners: list[int] = []
        for strategy in sorted(strategies, key=lambda strategy: (-promised[strategy], prices[strategy])):
            if corners and prices[strategy] >= prices[corners[-1]]:
                continue
            while len(corners) > 1 and loss(corners[-2], corners[-1]) >= loss(corners[-1], strategy):
                corners.pop()
            corners.append(strategy)
        steps = list(pairwise(corners))
        self.rungs = corners
        self.top = promised[corners[0]]
        self.saved_ms = [prices[upper] - prices[lower] for upper, lower in steps]  # by rung: of the step down from it
        self.lost = [promised[upper] - promised[lower] for upper, lower in steps]  # accuracy
        self.bargain = [lost / saved_ms for lost, saved_ms in zip(self.lost, self.saved_ms, strict=True)]


class Ladder:
    """The requests of one job on their way down a hull, as far as the job's accuracy allows.

    All requests leave a rung before any leaves the next one, because every next step loses more accuracy per ms saved.

    Args:
        needed_sum: lower bound on the sum of the promised accuracies of ``requests``.
    """

    __slots__ = ("_moved", "_requests", "_spare", "hull", "rung")

    def __init__(self, hull: Hull, requests: int, needed_sum: float) -> None:
        self.hull = hull
        self.rung = 0
        self._requests = requests
        self._moved = 0  # requests that have left this rung for the next
        self._spare = hull.top * requests - needed_sum + EPSILON

    def available(self) -> int:
        """How many requests may still step from this rung to the next."""
        if self.rung == len(self.hull.lost):
            return 0
        lost = self.hull.lost[self.rung]
        staying = self._requests - self._moved
        return staying if lost * staying <= self._spare else max(0, int(self._spare / lost))

    def descend(self, requests: int) -> None:
        """Moves ``requests``, at most ``available()``, one rung down."""
        self._spare -= self.hull.lost[self.rung] * requests
        self._moved += requests
        if self._moved == self._requests:
            self.rung += 1
            self._moved = 0

    def split(self) -> Split:
        rungs = self.hull.rungs
        if not self._moved:
            return {rungs[self.rung]: self._requests}
        return {rungs[self.rung]: self._requests - self._moved, rungs[self.rung + 1]: self._moved}
