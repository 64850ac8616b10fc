"""Simulates the batches in which a queue will run, and when each job ends."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace

from skipkernels.modality.demand import Demand
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.optimiser import Split


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large batches may be."""

    sizes: Sequence[int]  # by strategy
    longest_ms: float = math.inf  # batches that would take longer are made smaller, down to one request


@dataclass(frozen=True, slots=True)
class Plan:
    """The result. Only the first batch is started as planned; the others show which jobs would be late."""

    strategy: int  # of the first batch, like the next two
    members: list[tuple[int, int]]  # position of the demand, number of its requests
    expected_ms: float
    end_ms: list[float]  # of each demand


def lay_out(
    demands: Sequence[Demand],
    splits: Sequence[Split],
    order: Sequence[int],
    free_ms: Sequence[float],
    latency: LatencyModel,
    limits: BatchLimits,
) -> Plan:
    """Each job in turn gets its batches, on the worker that is free first. A batch that is not full is filled with
    requests of later jobs that have the same strategy, unless that would make the job itself late.

    A job's end is the expected end of its last batch plus a margin. The margin treats batch times as independent: the
    squared distances of their 95th percentiles from their medians add up.

    Args:
        demands, splits: by position; ``order`` lists positions in the order of service, at least one.
        free_ms: when each worker is free; the first batch is for the earliest.
    """
    return _Layout(demands, splits, order, free_ms, latency, limits).plan()


class _Layout:
    def __init__(
        self,
        demands: Sequence[Demand],
        splits: Sequence[Split],
        order: Sequence[int],
        free_ms: Sequence[float],
        latency: LatencyModel,
        limits: BatchLimits,
    ) -> None:
        self._demands = demands
        self._order = order
        self._latency = latency
        self._limits = limits
        self._free_ms = list(free_ms)
        heapify(self._free_ms)
        self._left = [split.copy() for split in splits]  # requests without a batch
        self._rows: dict[int, list[int]] = {}  # strategy -> positions, in order
        for position in order:
            for strategy in splits[position]:
                self._rows.setdefault(strategy, []).append(position)
        self._heads = dict.fromkeys(self._rows, 0)  # strategy -> the first of its row that may have requests left

    def plan(self) -> Plan:
        end_ms = [0.0] * len(self._demands)
        first: tuple[int, list[tuple[int, int]], float] | None = None
        variance = 0.0
        for position in self._order:
            left, work = self._left[position], self._demands[position].work
            for strategy in left:
                batch_ms, spread_ms = self._latency.batch_ms[strategy], self._latency.spread_ms[strategy]
                while left[strategy]:
                    members, size = self._batch(position, strategy)
                    expected_ms = batch_ms[size] * work
                    if first is None:
                        first = strategy, members, expected_ms
                    variance += (spread_ms[size] * work) ** 2
                    done_ms = self._free_ms[0] + expected_ms
                    heapreplace(self._free_ms, done_ms)
                    done_ms += math.sqrt(variance)
                    for member, _ in members:
                        if done_ms > end_ms[member]:
                            end_ms[member] = done_ms
        assert first is not None, "a plan needs a waiting request"
        return Plan(*first, end_ms)

    def _batch(self, position: int, strategy: int) -> tuple[list[tuple[int, int]], int]:
        """The next batch of a job's requests: its members, and how many requests they are."""
        left, work = self._left[position], self._demands[position].work
        batch_ms = self._latency.batch_ms[strategy]
        limit = self._limits.sizes[strategy]
        if batch_ms[limit] * work > self._limits.longest_ms:
            limit = max(1, bisect_right(batch_ms, self._limits.longest_ms / work, 1, limit) - 1)
        size = min(left[strategy], limit)
        left[strategy] -= size
        members = [(position, size)]
        if size < limit:
            room_ms = self._demands[position].deadline_ms - self._free_ms[0]
            for other, count in left.items():
                if count:  # the job's requests with other strategies come after this batch
                    times = self._latency.batch_ms[other]
                    room_ms -= times[min(count, len(times) - 1)] * work
            if batch_ms[size] * work <= room_ms < batch_ms[limit] * work:
                limit = bisect_right(batch_ms, room_ms / work, size, limit) - 1
            size += self._fill(members, strategy, limit - size, work)
        return members, size

    def _fill(self, members: list[tuple[int, int]], strategy: int, room: int, work: float) -> int:
        """Adds up to ``room`` requests of later jobs, unless they are larger and would slow the batch down."""
        row, head = self._rows[strategy], self._heads[strategy]
        added = 0
        while head < len(row):
            other = row[head]
            waiting = self._left[other][strategy]
            if waiting:
                count = min(waiting, room - added)
                if not count or self._demands[other].work > work:
                    break
                self._left[other][strategy] -= count
                members.append((other, count))
                added += count
                if count < waiting:
                    break
            head += 1
        self._heads[strategy] = head
        return added
