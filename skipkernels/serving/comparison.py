"""All policies on the same arrivals, simulated: how much each carries with few violations, and what overload does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from skipkernels.serving.arrivals import Process, Times, poisson
from skipkernels.serving.errors import JobError
from skipkernels.serving.metrics import Summary, summarise
from skipkernels.serving.policies import POLICIES
from skipkernels.serving.profile import Profile
from skipkernels.serving.simulator import simulate
from skipkernels.serving.workload import Workload

Progress = Callable[[str, float], None]
"""Called as (what is being done, share of everything that is done)."""

_RATE_PRECISION = 0.02  # at which the search for a rate stops
_LOWEST_PER_S, _HIGHEST_PER_S = 1e-3, 1e6


@dataclass(frozen=True)
class Load:
    """Arrivals at any rate: the same draws, stretched in time. So policies and rates meet the same jobs.

    Args:
        times: of a process of one job per second on the mean.
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

    def run(self, workload: Workload, profile: Profile, policy: str, workers: int, requests_per_s: float) -> Summary:
        jobs_per_s = requests_per_s / (sum(self.sizes) / len(self.sizes))
        arrivals = workload.arrivals(self.times / jobs_per_s, self.sizes, profile)
        return summarise(simulate(arrivals, profile, policy, workers=workers))


@dataclass(frozen=True)
class PolicyResult:
    """One policy under one load."""

    policy: str
    capacity: Summary  # at the highest rate with few violations
    overload: Summary  # at the rate of the overload


def compare_policies(
    profile: Profile,
    workload: Workload,
    *,
    overload_per_s: float,
    policies: Sequence[str] = tuple(POLICIES),
    max_violations: float = 0.01,
    jobs: int = 3000,
    process: Process = poisson,
    workers: int = 1,
    seed: int = 0,
    progress: Progress = lambda stage, share: None,
) -> list[PolicyResult]:
    """Finds each policy's highest rate with a violation ratio of at most ``max_violations``, by bisection, and runs all
    of them at ``overload_per_s`` requests per second.

    Args:
        process: draws arrival times, see ``arrivals``.
        progress: see ``Progress``.
    """
    load = Load.draw(workload, jobs, seed, process)
    results = []
    for number, policy in enumerate(policies):
        progress(f"searching the rate of {policy}", number / len(policies))
        run = partial(load.run, workload, profile, policy, workers)
        capacity = _highest_rate(run, max_violations)
        progress(f"overloading {policy}", (number + 0.8) / len(policies))
        results.append(PolicyResult(policy, capacity, run(overload_per_s)))
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
                f"most {max_violations:.1%} should; the load does not decide it"
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
