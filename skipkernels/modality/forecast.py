"""Estimates the load of the near future from the latest jobs."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from itertools import accumulate

_JOBS = 64
_ENOUGH = 16  # jobs, to estimate a rate from
_URGENT = 0.1  # the share of jobs that cannot wait as long as ``patience_ms``


class Forecast:
    """The latest jobs: when they came, how long they could wait, and what they take at their cheapest."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[float, float, float]] = deque(maxlen=_JOBS)  # arrival, deadline, cheapest, all in ms
        self._deadlines_ms: list[float] = []  # ascending
        self._cheapest_ms: list[float] = [0.0]  # cumulated in order of the deadlines
        self._weighted: list[float] = [0.0]  # the same, each times its deadline
        self.patience_ms = math.inf
        """How long an urgent job (10th percentile) can wait for a worker and still be in time at its cheapest."""

    def note(self, arrival_ms: float, deadline_ms: float, cheapest_ms: float) -> None:
        """Records a job; ``deadline_ms`` counts from its arrival."""
        self._jobs.append((arrival_ms, deadline_ms, cheapest_ms))
        jobs = sorted((deadline, cheapest) for _, deadline, cheapest in self._jobs if deadline < math.inf)
        self._deadlines_ms = [deadline for deadline, _ in jobs]
        self._cheapest_ms = [0.0, *accumulate(cheapest for _, cheapest in jobs)]
        self._weighted = [0.0, *accumulate(deadline * cheapest for deadline, cheapest in jobs)]
        # jobs without a deadline count: one hurried job among many is no reason for all to run in small batches
        everyone = ((deadline, cheapest) for _, deadline, cheapest in self._jobs)
        waits_ms = sorted(wait for deadline, cheapest in everyone if (wait := deadline - cheapest) > 0.0)
        self.patience_ms = waits_ms[int(_URGENT * len(waits_ms))] if waits_ms else math.inf

    def taken_ms(self, now_ms: float, until_ms: float) -> float:
        """Expected time that jobs which arrive from now on and are due before ``until_ms`` take at their cheapest.

        Assumes that they arrive as the latest jobs did. Jobs with a deadline of d count if they arrive before
        ``until_ms - d``.
        """
        jobs, within_ms = len(self._jobs), until_ms - now_ms
        span_ms = now_ms - self._jobs[0][0] if jobs >= _ENOUGH else 0.0
        earlier = bisect_left(self._deadlines_ms, within_ms)
        if not earlier or span_ms <= 0.0 or within_ms == math.inf:
            return 0.0
        came = (jobs - 1) / jobs  # the span begins with the first job, which is not counted
        return came * (within_ms * self._cheapest_ms[earlier] - self._weighted[earlier]) / span_ms
