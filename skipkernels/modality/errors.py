"""Errors of jobs, strategies, profiles and workers."""

from __future__ import annotations

import math

from skipkernels.errors import RequestError, SkipkernelsError


class StrategyError(SkipkernelsError, ValueError):
    """A strategy is impossible or the model does not offer it."""


class ProfileError(SkipkernelsError, ValueError):
    """A profile cannot be read, does not belong to this model, device or dtype, or lacks what is asked of it."""


class JobError(RequestError):
    """A job cannot be served: no requests, an unknown modality, a deadline that is not a time."""


class AccuracyUnreachable(JobError):
    """No strategy promises the accuracy a job requires; ``reachable`` is the best that one does."""

    def __init__(self, required: float, reachable: float) -> None:
        shown = math.floor(reachable * 1e4 + 1e-6) / 1e4  # rounded down, so that a job that asks for it is accepted
        super().__init__(
            f"min_accuracy {required:g} cannot be promised: the best reachable with these modalities is "
            f"{shown:.4f}; lower it, or profile on more validation samples to narrow the confidence bound"
        )
        self.reachable = reachable


class DeadlineUnreachable(JobError):
    """Refused on arrival: even at its cheapest, the job would be ``late_by_ms`` late or would make another one late."""

    def __init__(self, deadline_ms: float, late_by_ms: float) -> None:
        super().__init__(
            f"a deadline of {deadline_ms:g} ms cannot be met after the jobs already accepted (late by "
            f"{late_by_ms:.1f} ms); try again later or allow more time"
        )
        self.late_by_ms = late_by_ms


class JobFailed(SkipkernelsError, RuntimeError):
    """An accepted job got no answer; the message says why."""


class WorkerLost(SkipkernelsError, RuntimeError):
    """A worker's device, process or machine was lost in the middle of a batch."""


class ServiceClosed(SkipkernelsError, RuntimeError):
    """A job came after the shutdown began."""
