"""A job of a replayed or simulated load, with its arrival time."""

from __future__ import annotations

from dataclasses import dataclass

from skipkernels.modality.job import Job


@dataclass(frozen=True)
class Arrival:
    """A job, and when it comes."""

    at_ms: float
    job: Job
