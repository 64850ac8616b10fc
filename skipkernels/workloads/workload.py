"""Jobs for benches and simulations, as in MOSEL's evaluation (arXiv 2310.18481)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from skipkernels.modality.arrival import Arrival
from skipkernels.modality.job import Job, Request
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.profile import Profile
from skipkernels.workloads.arrivals import Times


@dataclass(frozen=True)
class Workload:
    """How large jobs are, how long they may take, and how accurate they have to be.

    Args:
        size_mean, size_deviation: job sizes are drawn from this normal distribution, rounded, at least 1.
        extra_ms: a job's deadline is the time it takes alone with all modalities and no skipping, plus this.
        slack: a job's ``min_accuracy`` is what that strategy promises, less this.
    """

    size_mean: float = 1.0
    size_deviation: float = 6.0
    extra_ms: float = 17.0
    slack: float = 0.03

    def sizes(self, jobs: int, rng: np.random.Generator) -> list[int]:
        drawn = rng.normal(self.size_mean, self.size_deviation, jobs)
        return [max(1, round(size)) for size in drawn]

    def arrivals(
        self,
        times: Times,
        sizes: Sequence[int],
        profile: Profile,
        make_request: Callable[[], Request] | None = None,
    ) -> list[Arrival]:
        """One job for each time.

        Args:
            make_request: makes a request with all of the model's modalities; None: without data, for simulations.
        """
        full = profile.full(profile.modalities)
        latency = LatencyModel(profile)
        position = profile.strategies.index(full)
        empty = Request(dict.fromkeys(profile.modalities))
        arrivals = []
        for at_ms, size in zip(times, sizes, strict=True):
            job = Job(
                requests=[make_request() for _ in range(size)] if make_request else [empty] * size,
                deadline_ms=latency.alone_ms({position: size}) + self.extra_ms,
                min_accuracy=max(0.0, full.promised_accuracy - self.slack),
            )
            arrivals.append(Arrival(float(at_ms), job))
        return arrivals
