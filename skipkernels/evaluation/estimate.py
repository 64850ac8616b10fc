"""Metrics and their confidence intervals: percentile bootstrap over the items of a task (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
CONFIDENCE = 0.95

Item = tuple[float, float]
"""One item's contribution to a metric: sum and count. The metric is the total sum over the total count."""
Unit = Literal["share", "nats", "perplexity", "tokens", "points", "number", "tokens/s", "ratio"]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """One number that a task measures.

    ``exponential``: the metric is e to the mean, as a perplexity is.
    """

    name: str
    unit: Unit
    higher_is_better: bool
    exponential: bool = False

    def of(self, sums: Array, counts: Array) -> Array:
        mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        return np.exp(mean) if self.exponential else mean


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % interval; None if the count is 0."""

    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, value: float, resampled: Array) -> Estimate:
        if not np.isfinite(value):
            return cls(None, None, None)
        # not finite: resamples of items whose counts are all 0
        edge = 100 * (1 - CONFIDENCE) / 2
        low, high = np.percentile(resampled[np.isfinite(resampled)], (edge, 100 - edge))
        return cls(value, float(low), float(high))


def estimate(metric: Metric, items: Sequence[Item], seed: int) -> Estimate:
    """The metric over ``items`` and over resamples of them, drawn with replacement; same seed, same interval.

    The draws depend on the number of items and the seed only, so all methods get the same resamples.
    """
    sums, counts = np.array(items, dtype=np.float64).reshape(-1, 2).T
    value = float(metric.of(sums.sum(keepdims=True), counts.sum(keepdims=True))[0])
    drawn = draws(len(items), seed)
    resampled = metric.of(sums[drawn].sum(axis=1), counts[drawn].sum(axis=1))
    return Estimate.of(value, resampled)


def estimate_relative(metric: Metric, items: Sequence[Item], full: Sequence[Item], seed: int) -> Estimate:
    """The metric divided by the full model's on the same items; both are resampled together."""
    (sums, counts), (full_sums, full_counts) = (np.array(side, dtype=np.float64).T for side in (items, full))
    drawn = draws(len(items), seed)

    def ratio(rows: npt.NDArray[np.int64]) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return metric.of(sums[rows].sum(axis=-1), counts[rows].sum(axis=-1)) / metric.of(
                full_sums[rows].sum(axis=-1), full_counts[rows].sum(axis=-1)
            )

    return Estimate.of(float(ratio(np.arange(len(items))[None])[0]), ratio(drawn))


def draws(count: int, seed: int) -> npt.NDArray[np.int64]:
    """Indices of the items in each resample, [resamples, count]."""
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
