"""Predicts how long a batch takes: the profile's times, corrected by measured ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate

from skipkernels.modality.profile import Profile

_OWN_STEP = 0.2  # weight of a new measurement; after five batches most of the old factor is gone
_OTHERS_STEP = 0.05  # weight for the other strategies: a slower device slows all of them
_BATCH_WASTE = 0.05  # extra time per request that is accepted for a smaller batch


class LatencyModel:
    """Expected batch times by strategy, which is a position in ``profile.strategies``, and batch size.

    Each strategy has a correction factor, a moving average of the logarithm of measured over profiled time, so that
    outliers weigh less. The factors of strategies that did not run move towards the measured ones as well: otherwise
    one slow batch could keep a strategy from ever being tried again.

    Where requests join and leave a running step one by one (``slots``), a batch is one request, and its time depends on
    how many others run beside it: what n of them took together when they were profiled.

    Args:
        memory_bytes: the most that a batch may take on top of the loaded model; None: all profiled sizes are allowed.
        slots: requests that can share a step; None: whole batches, one after the other.

    Raises:
        ProfileError: some strategy does not fit ``memory_bytes`` with one request.
    """

    def __init__(self, profile: Profile, memory_bytes: float | None = None, *, slots: int | None = None) -> None:
        self._medians: list[list[float]] = []  # [strategy][batch size], entry 0 unused
        self._spreads: list[list[float]] = []  # 95th percentile above the median
        for entry in profile.strategies:
            sizes = range(1, entry.largest_batch(memory_bytes) + 1)
            # times never fall with the batch size: where measured ones do, that is noise
            self._medians.append([0.0, *accumulate((entry.median_ms(size) for size in sizes), max)])
            self._spreads.append([0.0, *(entry.p95_ms(size) - entry.median_ms(size) for size in sizes)])
        self._concurrency = slots
        self.batch_limits = [_efficient_batch(medians) for medians in self._medians]
        self.largest_batches = [len(medians) - 1 for medians in self._medians]
        if slots is not None:
            self.batch_limits = self.largest_batches = [1] * len(self._medians)
        self._log_factors = [0.0] * len(profile.strategies)
        self._correct()

    def _correct(self) -> None:
        factors = [math.exp(log_factor) for log_factor in self._log_factors]
        medians, spreads = self._medians, self._spreads
        if self._concurrency is not None:
            medians = [[0.0, _at(row, self._concurrency)] for row in medians]
            spreads = [[0.0, _at(row, self._concurrency)] for row in spreads]
        self.batch_ms = [[ms * by for ms in row] for row, by in zip(medians, factors, strict=True)]
        self.spread_ms = [[ms * by for ms in row] for row, by in zip(spreads, factors, strict=True)]

    @property
    def sharing(self) -> int | None:
        """How many requests are taken to share each step; None: whole batches are run."""
        return self._concurrency

    def expect(self, concurrency: int) -> bool:
        """Sets how many requests are taken to share each step; only where there are ``slots``. Returns whether that is
        another number."""
        assert self._concurrency is not None, "whole batches have no concurrency"
        if concurrency == self._concurrency:
            return False
        self._concurrency = concurrency
        self._correct()
        return True

    def profiled_ms(self, strategy: int, concurrency: int) -> float:
        """Profiled time of a request of unit work that shares every step with ``concurrency`` - 1 others."""
        return _at(self._medians[strategy], concurrency)

    @property
    def factors(self) -> list[float]:
        """Measured over profiled time, by strategy."""
        return [math.exp(log_factor) for log_factor in self._log_factors]

    def observe(self, strategy: int, batch_size: int, work: float, measured_ms: float) -> None:
        """Records how long a batch took, from its start to its answers."""
        self.observe_factor(strategy, max(measured_ms, 1e-3) / (self._medians[strategy][batch_size] * work))

    def observe_factor(self, strategy: int, factor: float) -> None:
        """Records a measured time as a multiple of the profiled one."""
        seen = math.log(max(factor, 1e-6))
        for other, log_factor in enumerate(self._log_factors):
            step = _OWN_STEP if other == strategy else _OTHERS_STEP
            self._log_factors[other] = log_factor + step * (seen - log_factor)
        self._correct()

    def alone_ms(self, split: Mapping[int, int]) -> float:
        """Time of a job by itself: its requests by strategy, in the largest batches allowed."""
        total_ms = 0.0
        for strategy, count in split.items():
            times = self.batch_ms[strategy]
            batches, rest = divmod(count, len(times) - 1)
            total_ms += batches * times[-1] + times[rest]
        return total_ms

    def request_ms(self, requests: int) -> list[float]:
        """Time per request, by strategy, in batches of up to ``requests`` (at least one)."""
        return [
            row[min(limit, requests)] / min(limit, requests)
            for row, limit in zip(self.batch_ms, self.batch_limits, strict=True)
        ]


def _at(row: list[float], concurrency: int) -> float:
    """Beyond the largest profiled number, time grows with the number."""
    largest = len(row) - 1
    return row[concurrency] if concurrency <= largest else row[largest] * concurrency / largest


def _efficient_batch(medians: list[float]) -> int:
    """The smallest batch whose time per request is near the best one's.

    Batches are not preempted: a larger one would keep urgent requests waiting and gain next to nothing.
    """
    per_request = [ms / size for size, ms in enumerate(medians) if size]
    near_best = (1 + _BATCH_WASTE) * min(per_request)
    return 1 + next(index for index, ms in enumerate(per_request) if ms <= near_best)
