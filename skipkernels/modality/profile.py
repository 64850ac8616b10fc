"""What each strategy costs and achieves: measured once per model and device, then plain data."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property

from skipkernels.modality.errors import JobError, ProfileError, StrategyError
from skipkernels.modality.step_times import StepTimes
from skipkernels.modality.strategy import ModalityModel, Strategy

_Z = 1.6448536269514722  # the standard normal's 95th percentile: promises are one-sided 95 % bounds


def wilson_lower_bound(score_sum: float, samples: int) -> float:
    """One-sided 95 % lower confidence bound of a mean score in [0, 1] (Wilson, JASA 1927).

    Meant for scores of 0 and 1; conservative for scores in between, because no score in [0, 1] has a larger variance
    than a coin flip of the same mean.
    """
    mean = score_sum / samples
    centre = mean + _Z**2 / (2 * samples)
    spread = _Z * math.sqrt(mean * (1 - mean) / samples + _Z**2 / (4 * samples**2))
    return max(0.0, (centre - spread) / (1 + _Z**2 / samples))


@dataclass(frozen=True)
class Timing:
    """One strategy at one batch size."""

    batch_size: int
    median_ms: float
    p95_ms: float
    peak_memory_bytes: int | None = None  # above the resident model; None: not measured


@dataclass(frozen=True)
class StrategyProfile:
    """One strategy: its timings by batch size, and its score over the validation set.

    Batch sizes between two profiled ones are interpolated linearly; larger ones than profiled are refused.
    """

    strategy: Strategy
    timings: tuple[Timing, ...]
    score_sum: float
    samples: int
    exact: bool = False  # the accuracy is agreement with this very strategy: it is 1 by construction
    kl: float | None = None  # mean KL(dense || this) per token of known text, in nats; None: not measured
    steps: StepTimes | None = None  # where requests join and leave steps one by one; None: not measured

    def __post_init__(self) -> None:
        object.__setattr__(self, "timings", tuple(sorted(self.timings, key=lambda timing: timing.batch_size)))
        name = self.strategy.name
        sizes = [timing.batch_size for timing in self.timings]
        if not sizes or sizes[0] != 1 or len(set(sizes)) < len(sizes):
            raise ProfileError(f"{name}: profiled batch sizes must be distinct and start at 1, got {sizes}")
        for timing in self.timings:
            if not 0.0 < timing.median_ms <= timing.p95_ms < math.inf:
                raise ProfileError(
                    f"{name}, batch {timing.batch_size}: expected 0 < median_ms <= p95_ms, "
                    f"got {timing.median_ms} and {timing.p95_ms}"
                )
        if self.samples < 1 or not 0.0 <= self.score_sum <= self.samples:
            raise ProfileError(
                f"{name}: a score of {self.score_sum} over {self.samples} samples is not a mean in [0, 1]"
            )
        if self.kl is not None and not 0.0 <= self.kl < math.inf:
            raise ProfileError(f"{name}: a KL divergence is a finite number of at least 0, got {self.kl}")

    @cached_property
    def promised_accuracy(self) -> float:
        return 1.0 if self.exact else wilson_lower_bound(self.score_sum, self.samples)

    @property
    def accuracy(self) -> float:
        """The mean score: an estimate, not the promised bound."""
        return 1.0 if self.exact else self.score_sum / self.samples

    @property
    def max_batch_size(self) -> int:
        return self.timings[-1].batch_size

    def median_ms(self, batch_size: int) -> float:
        return self._interpolate(batch_size, [timing.median_ms for timing in self.timings])

    def p95_ms(self, batch_size: int) -> float:
        return self._interpolate(batch_size, [timing.p95_ms for timing in self.timings])

    def peak_memory_bytes(self, batch_size: int) -> float:
        """Raises ProfileError when memory was not measured."""
        peaks = [timing.peak_memory_bytes for timing in self.timings]
        if any(peak is None for peak in peaks):
            raise ProfileError(f"{self.strategy}: the profile holds no memory measurements; profile again with memory")
        return self._interpolate(batch_size, [float(peak or 0) for peak in peaks])

    def largest_batch(self, memory_bytes: float | None) -> int:
        """The largest batch size whose peak memory is within ``memory_bytes`` (None: no limit).

        Raises:
            ProfileError: not even one request does.
        """
        if memory_bytes is None:
            return self.max_batch_size
        fitting = 0
        while fitting < self.max_batch_size and self.peak_memory_bytes(fitting + 1) <= memory_bytes:
            fitting += 1
        if fitting == 0:
            raise ProfileError(
                f"{self.strategy} takes {self.peak_memory_bytes(1):,.0f} bytes for one request, more than the memory "
                f"budget of {memory_bytes:,.0f}"
            )
        return fitting

    def _interpolate(self, batch_size: int, values: list[float]) -> float:
        sizes = [timing.batch_size for timing in self.timings]
        if not 1 <= batch_size <= sizes[-1]:
            raise ProfileError(f"{self.strategy}: batch size {batch_size} is outside the profiled 1..{sizes[-1]}")
        upper = bisect_left(sizes, batch_size)
        if sizes[upper] == batch_size:
            return values[upper]
        share = (batch_size - sizes[upper - 1]) / (sizes[upper] - sizes[upper - 1])
        return values[upper - 1] + share * (values[upper] - values[upper - 1])


@dataclass(frozen=True)
class Profile:
    """Every strategy of one model on one device.

    Args:
        model, fingerprint, device, dtype: of the ``ModalityModel`` it was made on.
        strategies: one entry for each profiled strategy.
        source: where the figures come from: ``measured``, or what they were derived from.
        measuring: whether more strategies of the model are being measured, or the same ones again; not kept in files.
        again: only the same ones again; not kept in files.
    """

    model: str
    fingerprint: str
    device: str
    dtype: str
    strategies: tuple[StrategyProfile, ...]
    source: str = "measured"
    measuring: bool = False
    again: bool = False

    def __post_init__(self) -> None:
        names = [entry.strategy.name for entry in self.strategies]
        if not names or len(set(names)) < len(names):
            raise ProfileError(f"a profile holds at least one strategy, each once; got {names}")

    @cached_property
    def modalities(self) -> frozenset[str]:
        """Every modality that some strategy keeps."""
        return frozenset(modality for entry in self.strategies for modality in entry.strategy.modalities)

    def __getitem__(self, strategy: Strategy) -> StrategyProfile:
        for entry in self.strategies:
            if entry.strategy == strategy:
                return entry
        known = ", ".join(entry.strategy.name for entry in self.strategies)
        raise StrategyError(f"{strategy} is not in the profile; it holds {known}")

    def check(self, model: ModalityModel) -> None:
        """Raises ProfileError when this is another model's profile, or another device's or dtype's."""
        for what in ("fingerprint", "device", "dtype"):
            ours, theirs = getattr(self, what), getattr(model, what)
            if ours != theirs:
                raise ProfileError(f"the profile is for {what} {ours}, this model's is {theirs}; profile this model")
        missing = [entry.strategy.name for entry in self.strategies if entry.strategy not in model.strategies]
        if missing:
            raise ProfileError(f"the profile holds {missing[0]}, which {model.name} does not offer; profile this model")

    def usable(self, modalities: Collection[str], skip_level: float | None = None) -> list[StrategyProfile]:
        """The strategies that run on requests of these ``modalities``, dominated ones included.

        Raises:
            JobError: none does.
        """
        entries = [entry for entry in self.strategies if set(entry.strategy.modalities) <= set(modalities)]
        if not entries:
            known = ", ".join(sorted({"+".join(entry.strategy.modalities) for entry in self.strategies}))
            raise JobError(f"nothing runs on {'+'.join(sorted(modalities))} alone; this model takes {known}")
        if skip_level is None:
            return entries
        levels = sorted({entry.strategy.skip_level for entry in entries})
        if skip_level not in levels:
            more = "; more are being measured, ask again later" if self.measuring and not self.again else ""
            known = ", ".join(map("{:g}".format, levels))
            there = f"there is only {known}" if len(levels) == 1 else f"there are {known}"
            raise JobError(
                f"no strategy has skip_level {skip_level:g}; {there}{more}",
                param="skip_level",
            )
        return [entry for entry in entries if entry.strategy.skip_level == skip_level]

    def level_within(
        self,
        modalities: Collection[str],
        max_kl: float,
        skip_level: float | None = None,
        min_accuracy: float = 0.0,
        *,
        sharing: int | None = None,
    ) -> float:
        """The largest skip level whose measured KL from the dense model is at most ``max_kl``, and that promises
        ``min_accuracy`` where one of them does. ``skip_level``: only this one; else only those that save time, with
        ``sharing`` as in ``prune_dominated``.

        Raises:
            JobError: there is none.
        """
        entries = self.usable(modalities, skip_level)
        if skip_level is None:
            saving = [*self.frontier(modalities, sharing=sharing), self.full(modalities)]
            levels = {entry.strategy.skip_level for entry in saving}
            entries = [entry for entry in entries if entry.strategy.skip_level in levels]
        costs = {entry.strategy.skip_level: self.kl_of(entry) for entry in entries}
        within = [entry for entry in entries if _is_within(self.kl_of(entry), max_kl)]
        if not within:
            told = ", ".join(
                f"{level:g}: {'not measured' if kl is None else f'{kl:.3g}'}" for level, kl in sorted(costs.items())
            )
            raise JobError(
                f"no strategy stays within max_kl {max_kl:g} nats; measured KL from the dense model, by skip level: "
                f"{told}",
                param="max_kl",
            )
        kept = [entry for entry in within if entry.promised_accuracy >= min_accuracy] or within
        return max(entry.strategy.skip_level for entry in kept)

    def kl_of(self, entry: StrategyProfile) -> float | None:
        """Of what leaves nothing out it is 0 by construction."""
        dense = entry.strategy.skip_level == 0.0 and set(entry.strategy.modalities) == self.modalities
        return 0.0 if dense else entry.kl

    def full(self, modalities: Collection[str], skip_level: float | None = None) -> StrategyProfile:
        """The strategy that leaves out the least: most modalities, then the lowest skip level."""
        return min(
            self.usable(modalities, skip_level),
            key=lambda entry: (-len(entry.strategy.modalities), entry.strategy.skip_level),
        )

    def frontier(
        self, modalities: Collection[str], skip_level: float | None = None, *, sharing: int | None = None
    ) -> list[StrategyProfile]:
        """The usable strategies that no other one dominates, most accurate first. ``sharing``: see
        ``prune_dominated``."""
        return prune_dominated(self.usable(modalities, skip_level), sharing)

    def offered_at(self, entry: StrategyProfile) -> tuple[int, ...]:
        """The profiled numbers of requests that share steps at which ``entry`` may be chosen unasked; empty: it is for
        requests that ask for its level."""
        modalities = entry.strategy.modalities
        sizes = (timing.batch_size for timing in entry.timings)
        return tuple(size for size in sizes if entry in self.frontier(modalities, sharing=size))


def _is_within(kl: float | None, max_kl: float) -> bool:
    return kl is not None and kl <= max_kl


WORTH = 0.03
"""Accuracy is not given away for a smaller share of the time: profiles of one strategy differ by as much from one
moment to the next. Single neurons that were profiled 2 % faster for eight rows, and whose steps took 5 % longer, cost
an eighth of the goodput (SmolLM2-135M, bf16; ``bench/goodput.py``)."""


def prune_dominated(entries: Iterable[StrategyProfile], sharing: int | None = None) -> list[StrategyProfile]:
    """Drops every strategy for which another promises as much and costs no more. Times that differ by less than
    ``WORTH`` are taken to be equal. Most accurate first.

    Args:
        sharing: how many requests share each step: what counts is the time of one of them. None: whole batches are run,
            of a size that is chosen together with the strategy. Then those are kept that are not dropped at every size,
            in time or memory.
    """
    listed = sorted(entries, key=lambda entry: (-entry.promised_accuracy, _costs(entry)))
    if sharing is not None:
        return _worth_it(listed, sharing)
    kept: set[str] = set()
    for size in range(1, max(entry.max_batch_size for entry in listed) + 1):
        there = [entry for entry in listed if entry.max_batch_size >= size]
        kept |= {entry.strategy.name for entry in _worth_it(there, size, memory=True)}
    return [entry for entry in listed if entry.strategy.name in kept]


def _worth_it(listed: Iterable[StrategyProfile], size: int, *, memory: bool = False) -> list[StrategyProfile]:
    """Those that none before them makes needless, with ``size`` requests at once."""
    kept: list[StrategyProfile] = []
    # whatever dominates an entry comes before it in this order
    for entry in sorted(listed, key=lambda entry: (-entry.promised_accuracy, _shared_ms(entry, size))):
        if not any(_costs_no_more(other, entry, size, memory) for other in kept):
            kept.append(entry)
    return kept


def _costs(entry: StrategyProfile) -> list[tuple[float, float]]:
    return [(timing.median_ms, float(timing.peak_memory_bytes or 0)) for timing in entry.timings]


def _costs_no_more(one: StrategyProfile, other: StrategyProfile, size: int, memory: bool) -> bool:
    if _shared_ms(one, size) * (1.0 - WORTH) > _shared_ms(other, size):
        return False
    measured = all(timing.peak_memory_bytes is not None for timing in one.timings + other.timings)
    return not (memory and measured) or one.peak_memory_bytes(size) <= other.peak_memory_bytes(size)


def _shared_ms(entry: StrategyProfile, size: int) -> float:
    """Beyond the largest profiled number, time grows with the number."""
    largest = entry.max_batch_size
    return entry.median_ms(size) if size <= largest else entry.median_ms(largest) * size / largest
