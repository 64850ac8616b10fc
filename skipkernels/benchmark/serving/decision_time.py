"""How long a scheduler takes to decide, on queues from hopeless to at leisure."""

from __future__ import annotations

import time
from collections.abc import Sequence

from skipkernels.modality.clock import VirtualClock
from skipkernels.modality.job import Job, Request
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.profile import Profile
from skipkernels.modality.scheduler import Scheduler

_SHARES = (0.02, 0.2, 0.5, 2.0)  # of the time that all requests take one after the other with everything
_ACCURACIES = 7  # different requirements in a queue


def decision_times_ms(
    profile: Profile, selection: str, *, requests: int = 256, repeats: int = 10
) -> dict[float, Sequence[float]]:
    """Wall-clock times of single decisions, each on a queue of ``requests`` jobs of one request: the most jobs, and so
    the longest decision, that so many requests can make.

    Returns:
        For each share of the time that the whole queue would take with all modalities and no skipping: the deadlines
        are spread evenly up to there.
    """
    full = profile.full(profile.modalities)
    alone_ms = LatencyModel(profile).alone_ms({profile.strategies.index(full): 1})
    least = min(entry.promised_accuracy for entry in profile.strategies)
    inputs = dict.fromkeys(profile.modalities)
    times: dict[float, Sequence[float]] = {}
    for share in _SHARES:
        taken = []
        for _ in range(repeats):
            scheduler = Scheduler(profile, VirtualClock(), selection)
            for number in range(requests):
                required = least + (full.promised_accuracy - least) * (number % _ACCURACIES) / _ACCURACIES
                deadline_ms = share * alone_ms * (1 + number * 97 % requests)  # in no order
                scheduler.submit(Job([Request(inputs)], deadline_ms, required))
            begin = time.perf_counter()
            scheduler.next_batch(0)
            taken.append((time.perf_counter() - begin) * 1e3)
        times[share] = taken
    return times
