"""The strategies that requests of one set of modalities can be served with."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from skipkernels.modality.ladder import Hull, Ladder
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.optimiser import EPSILON, Split, SplitTable
from skipkernels.modality.profile import Profile


class StrategyOptions:
    """The undominated strategies, as positions in ``profile.strategies``, most accurate first, and the splits of jobs.
    Where requests share steps: undominated with as many as ``latency`` takes to share them now.

    Args:
        modalities: of the requests.
        skip_level: None: any.

    Raises:
        JobError: no strategy runs on these modalities, or has this level.
    """

    def __init__(
        self,
        profile: Profile,
        modalities: Collection[str],
        latency: LatencyModel,
        skip_level: float | None = None,
    ) -> None:
        position = {entry.strategy: index for index, entry in enumerate(profile.strategies)}
        self.frontier = frontier = profile.frontier(modalities, skip_level, sharing=latency.sharing)
        self.skip_level = skip_level
        self.strategies = [position[entry.strategy] for entry in frontier]
        self.promised = [entry.promised_accuracy for entry in profile.strategies]  # by position in the profile
        self._full = position[profile.full(modalities, skip_level).strategy]
        self._table = SplitTable(
            [entry.promised_accuracy for entry in frontier],
            [latency.batch_ms[strategy] for strategy in self.strategies],
        )
        prices = latency.request_ms(max(latency.batch_limits))
        self._hull = Hull(self.strategies, self.promised, prices)

    @property
    def reachable(self) -> float:
        """The best accuracy that can be promised."""
        return self.promised[self.strategies[0]]

    def best(self, requests: int) -> Split:
        return {self.strategies[0]: requests}

    def full(self, requests: int, needed_sum: float) -> Split:
        """All modalities and no skipping; the most accurate strategy where that promises too little."""
        promised = self.promised[self._full] * requests
        return {self._full: requests} if promised >= needed_sum - EPSILON else self.best(requests)

    def cheapest(self, requests: int, needed_sum: float) -> Split:
        """The cheapest split that reaches ``needed_sum``; for jobs larger than the table, within one request of it."""
        if requests <= self._table.size:
            split, _ = self._table.cheapest(requests, needed_sum)
            return {self.strategies[row]: count for row, count in split.items()}
        ladder = Ladder(self._hull, requests, needed_sum)
        while ladder.available():
            ladder.descend(ladder.available())
        return ladder.split()


def cost_ms(split: Split, prices: Sequence[float]) -> float:
    """Of requests that share batches at ``prices`` each, by strategy."""
    total_ms = 0.0
    for strategy, count in split.items():  # a generator inside sum() takes three times as long
        total_ms += prices[strategy] * count
    return total_ms
