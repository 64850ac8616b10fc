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
    """No strategy promises the accuracy a job requires; ``reachable`` is the best that one does. ``among``: of which
    strategies, where the job leaves only some."""

    def __init__(self, required: float, reachable: float, among: str = "") -> None:
        shown = math.floor(reachable * 1e4 + 1e-6) / 1e4  # rounded down, so that a job that asks for it is accepted
        super().__init__(
            f"min_accuracy {required:g} cannot be promised: at most {shown:.4f} can{among and f', {among}'}; ask for "
            "no more than that",
            param="min_accuracy",
        )
        self.reachable = reachable


class DeadlineUnreachable(JobError):
    """Refused on arrival: even at its cheapest, the job would be ``late_by_ms`` late or would make another one late."""

    def __init__(self, deadline_ms: float, late_by_ms: float) -> None:
        super().__init__(
            f"a deadline of {deadline_ms:g} ms cannot be met after the jobs already accepted (late by "
            f"{late_by_ms:.1f} ms); try again later or allow more time",
            param="deadline_ms",
        )
        self.late_by_ms = late_by_ms


class JobFailed(SkipkernelsError, RuntimeError):
    """An accepted job got no answer; the message says why."""


class WorkerLost(SkipkernelsError, RuntimeError):
    """A worker's device, process or machine was lost in the middle of a batch."""


class ServiceClosed(SkipkernelsError, RuntimeError):
    """A job came after the shutdown began."""
