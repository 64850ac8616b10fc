"""Simulates contenders on the same arrivals: the highest rate with few violations, and the effect of overload."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from skipkernels.benchmark.serving.contender import Contender
from skipkernels.modality.arrival import Arrival
from skipkernels.modality.errors import JobError
from skipkernels.modality.job import Request
from skipkernels.modality.metrics import Summary, summarise
from skipkernels.modality.profile import Profile
from skipkernels.modality.simulator import simulate
from skipkernels.workloads.arrivals import Process, Times, poisson
from skipkernels.workloads.workload import Workload

Progress = Callable[[str, float], None]
"""Called as (what is being done, share of everything that is done)."""

_RATE_PRECISION = 0.02  # at which the search for a rate stops
_LOWEST_PER_S, _HIGHEST_PER_S = 1e-3, 1e6


@dataclass(frozen=True)
class Load:
    """The same draws at any rate, scaled in time, so that all policies and rates get the same jobs.

    Args:
        times: arrival times at a mean rate of one job per second.
        sizes: of the jobs.
    """

    times: Times
    sizes: Sequence[int]

    @classmethod
    def draw(
        cls,
        workload: Workload,
        jobs: int,
        seed: int,
        process: Process = poisson,
    ) -> Load:
        rng = np.random.default_rng(seed)
        return cls(process(1.0, jobs, rng), workload.sizes(jobs, rng))

    def arrivals(
        self,
        workload: Workload,
        profile: Profile,
        requests_per_s: float,
        make_request: Callable[[], Request] | None = None,
    ) -> list[Arrival]:
        """The arrivals at this mean rate; ``make_request`` as in ``Workload.arrivals``."""
        jobs_per_s = requests_per_s / (sum(self.sizes) / len(self.sizes))
        return workload.arrivals(self.times / jobs_per_s, self.sizes, profile, make_request)

    def run(self, workload: Workload, contender: Contender, workers: int, requests_per_s: float) -> Summary:
        """Simulates a contender at this rate."""
        arrivals = self.arrivals(workload, contender.profile, requests_per_s)
        return summarise(simulate(arrivals, contender.profile, contender.selection, workers=workers))


@dataclass(frozen=True)
class Result:
    """One contender at its capacity and under overload."""

    contender: str
    capacity: Summary  # at the highest rate with few violations
    overload: Summary  # at the rate of the overload


def compare(
    contenders: Sequence[Contender],
    workload: Workload,
    *,
    overload_per_s: float,
    max_violations: float = 0.01,
    jobs: int = 3000,
    process: Process = poisson,
    workers: int = 1,
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
) -> list[Result]:
    """Finds each contender's highest rate with a violation ratio of at most ``max_violations``, by bisection, and runs
    all of them at ``overload_per_s`` requests per second.

    Args:
        process: draws arrival times, see ``arrivals``.
        progress: see ``Progress``.

    Raises:
        JobError: no rate separates few from many violations: a contender has too many, or too few, at every rate.
    """
    load = Load.draw(workload, jobs, seed, process)
    results = []
    for number, contender in enumerate(contenders):
        progress(f"searching the rate of {contender.name}", number / len(contenders))
        run = partial(load.run, workload, contender, workers)
        capacity = _highest_rate(run, max_violations)
        progress(f"overloading {contender.name}", (number + 0.8) / len(contenders))
        results.append(Result(contender.name, capacity, run(overload_per_s)))
    return results


def _highest_rate(run: Callable[[float], Summary], max_violations: float) -> Summary:
    """Doubles or halves the rate until one keeps to ``max_violations`` and the next does not, then bisects."""
    rate, summary = 1.0, run(1.0)
    rising = summary.violation_ratio <= max_violations
    best = summary
    while (summary.violation_ratio <= max_violations) == rising:
        if rising:
            best = summary
        rate *= 2.0 if rising else 0.5
        if not _LOWEST_PER_S < rate < _HIGHEST_PER_S:
            raise JobError(
                f"at {rate:g} requests per second {summary.violation_ratio:.1%} of the jobs miss their deadline, at "
                f"most {max_violations:.1%} should; this does not depend on the rate: change the deadlines of the jobs"
            )
        summary = run(rate)
    if not rising:
        best = summary
    low, high = (rate / 2.0, rate) if rising else (rate, 2.0 * rate)
    while high > (1.0 + _RATE_PRECISION) * low:
        middle = math.sqrt(low * high)
        summary = run(middle)
        if summary.violation_ratio <= max_violations:
            low, best = middle, summary
        else:
            high = middle
    return best
