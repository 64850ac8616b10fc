"""The cheapest way to split a job over strategies, exactly: the offline half of MOSEL (arXiv 2310.18481).

    minimise  sum_i ms_i(x_i)   subject to   sum_i x_i = B,   sum_i promised_i * x_i >= target * B,   x_i integer >= 0

``ms_i(x)`` is the time of x requests of strategy i in the best batch sizes. It is not linear, because a batch has a
fixed cost. For jobs of up to ``TABLE_SIZE`` requests, one table of undominated splits answers every accuracy target;
larger jobs are solved as an integer program.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skipkernels.errors import SkipkernelsError
from skipkernels.modality.errors import AccuracyUnreachable, JobError
from skipkernels.modality.profile import StrategyProfile

TABLE_SIZE = 32
EPSILON = 1e-9  # tolerance on sums of promised accuracies: above rounding errors, far below one request's share

Split = dict[int, int]
"""How many requests take which strategy; strategies without any are absent."""


def serial_ms(batch_ms: Sequence[float], requests: int) -> list[float]:
    """The least time of 0, 1, ... ``requests`` requests in batches one after the other.

    Args:
        batch_ms: [batch size] for every size up to the largest; entry 0 unused.
    """
    best = [0.0]
    for total in range(1, requests + 1):
        best.append(min(batch_ms[size] + best[total - size] for size in range(1, min(total, len(batch_ms) - 1) + 1)))
    return best


@dataclass(frozen=True)
class _Undominated:
    """The undominated splits of one job size: ascending in the promised sum, and so in time."""

    promised_sum: npt.NDArray[np.float64]
    ms: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]  # [splits, strategies]


class SplitTable:
    """The cheapest splits of jobs of up to ``size`` requests, for every accuracy target.

    Args:
        promised: by strategy.
        batch_ms: by strategy and batch size; entry 0 of each row unused.
    """

    def __init__(self, promised: Sequence[float], batch_ms: Sequence[Sequence[float]], size: int = TABLE_SIZE) -> None:
        self.size = size
        self._promised = list(promised)
        times = [np.array(serial_ms(row, size)) for row in batch_ms]
        none = _Undominated(np.zeros(1), np.zeros(1), np.zeros((1, len(promised)), dtype=np.int64))
        rows: list[_Undominated | None] = [none] + [None] * size
        # adds one strategy at a time: rows[n] are the undominated splits of n requests over the strategies so far
        for strategy, (accuracy, ms) in enumerate(zip(promised, times, strict=True)):
            rows = [
                _merge(
                    [
                        _with(before, strategy, extra, accuracy, ms)
                        for extra in range(total + 1)
                        if (before := rows[total - extra]) is not None
                    ]
                )
                for total in range(size + 1)
            ]
        self._rows = [
            ([float(value) for value in row.promised_sum], row.ms, row.counts) for row in rows if row is not None
        ]

    def cheapest(self, requests: int, needed_sum: float) -> tuple[Split, float]:
        """The cheapest split whose promised accuracies sum to at least ``needed_sum``, and its time in ms.

        Raises:
            AccuracyUnreachable: no split does.
        """
        sums, ms, counts = self._rows[requests]
        position = bisect_left(sums, needed_sum - EPSILON)
        if position == len(sums):
            raise AccuracyUnreachable(needed_sum / requests, max(self._promised))
        split = {strategy: int(count) for strategy, count in enumerate(counts[position]) if count}
        return split, float(ms[position])


def cheapest_split(entries: Sequence[StrategyProfile], requests: int, min_accuracy: float) -> tuple[Split, float]:
    """The cheapest split of one job over ``entries``, for any job size; keys are positions in ``entries``.

    Raises:
        AccuracyUnreachable: no split meets the target.
        JobError: no requests.
    """
    if requests < 1:
        raise JobError(f"a job needs at least one request, got {requests}")
    promised = [entry.promised_accuracy for entry in entries]
    if min_accuracy * requests > max(promised) * requests + EPSILON:
        raise AccuracyUnreachable(min_accuracy, max(promised))
    batch_ms = [[0.0, *(entry.median_ms(size) for size in range(1, entry.max_batch_size + 1))] for entry in entries]
    if requests <= TABLE_SIZE:
        return SplitTable(promised, batch_ms, requests).cheapest(requests, min_accuracy * requests)
    return _integer_program(promised, [serial_ms(row, requests) for row in batch_ms], requests, min_accuracy)


def _with(
    before: _Undominated, strategy: int, extra: int, accuracy: float, ms: npt.NDArray[np.float64]
) -> _Undominated:
    counts = before.counts.copy()
    counts[:, strategy] += extra
    return _Undominated(before.promised_sum + extra * accuracy, before.ms + ms[extra], counts)


def _merge(parts: Sequence[_Undominated]) -> _Undominated | None:
    if not parts:
        return None
    promised_sum = np.concatenate([part.promised_sum for part in parts])
    ms = np.concatenate([part.ms for part in parts])
    counts = np.concatenate([part.counts for part in parts])
    order = np.lexsort((ms, -promised_sum))  # most accurate first, the cheaper of equals first
    cheapest_before = np.minimum.accumulate(np.concatenate([[np.inf], ms[order][:-1]]))
    kept = order[ms[order] < cheapest_before][::-1]
    return _Undominated(promised_sum[kept], ms[kept], counts[kept])


def _integer_program(
    promised: Sequence[float], times: Sequence[Sequence[float]], requests: int, min_accuracy: float
) -> tuple[Split, float]:
    """One binary variable for each strategy and count: exactly one count of each strategy is chosen."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise SkipkernelsError(
            f"splitting a job of more than {TABLE_SIZE} requests needs scipy: pip install 'skipkernels[serve]'"
        ) from error
    strategies, options = len(promised), requests + 1
    counts = np.tile(np.arange(options), strategies)
    one_each = np.kron(np.eye(strategies), np.ones(options))
    result = milp(
        np.concatenate(times),
        integrality=np.ones(strategies * options),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(counts, requests, requests),
            LinearConstraint(counts * np.repeat(promised, options), lb=min_accuracy * requests - EPSILON),
        ],
        options={"mip_rel_gap": 0.0},
    )
    assert result.x is not None, f"all requests on the most accurate strategy is a solution; got {result.message}"
    chosen = result.x.reshape(strategies, options).argmax(axis=1)
    return {strategy: int(count) for strategy, count in enumerate(chosen) if count}, float(result.fun)
