"""Measures the decision time of a scheduler, on queues with tight to loose deadlines."""

from __future__ import annotations

import time
from collections.abc import Sequence

from skipkernels.modality.clock import VirtualClock
from skipkernels.modality.job import Job, Request
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.profile import Profile
from skipkernels.modality.scheduler import Scheduler

_SHARES = (0.02, 0.2, 0.5, 2.0)  # of the time of all requests one after the other, with all modalities and no skipping
_ACCURACIES = 7  # different requirements in a queue


def decision_times_ms(
    profile: Profile, selection: str, *, requests: int = 256, repeats: int = 10
) -> dict[float, Sequence[float]]:
    """Wall-clock times of single decisions. Each queue has ``requests`` jobs of one request: the most jobs that so many
    requests can form, and so the slowest decision.

    Returns:
        Times by share. Deadlines are spread evenly from 0 to that share of the time that the whole queue takes with all
        modalities and no skipping.
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
                deadline_ms = share * alone_ms * (1 + number * 97 % requests)  # shuffled
                scheduler.submit(Job([Request(inputs)], deadline_ms, required))
            begin = time.perf_counter()
            scheduler.next_batch(0)
            taken.append((time.perf_counter() - begin) * 1e3)
        times[share] = taken
    return times
