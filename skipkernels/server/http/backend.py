"""What runs the jobs of a server: this process, or a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from skipkernels.decoding.cache_status import CacheStatus
from skipkernels.modality.counters import Counters
from skipkernels.modality.job import Job, JobAnswer
from skipkernels.modality.profile import Profile
from skipkernels.modality.runtime import Runtime


@dataclass(frozen=True)
class Status:
    """Counters, queue length and workers of a backend."""

    counters: Counters
    waiting_requests: int
    running_requests: int
    workers: int
    cache: CacheStatus | None = None


class Backend(Protocol):
    """One queue of jobs and the workers behind it. All calls come from one event loop."""

    async def start(self) -> None: ...

    async def submit(self, job: Job) -> JobAnswer:
        """Waits for a job's answer; cancelling this call cancels the job.

        Raises:
            JobError: refused.
            ServiceClosed: the shutdown has begun.
            JobFailed, WorkerLost: accepted, but not answered.
        """
        ...

    async def status(self) -> Status: ...

    def adopt(self, profile: Profile) -> None:
        """Goes on with a profile that holds more strategies of the same model."""
        ...

    async def close(self, grace_s: float) -> None:
        """Accepts no more jobs, and returns when every accepted one is answered or failed. Jobs that still wait after
        ``grace_s`` fail. May be called again with a shorter ``grace_s``."""
        ...


class Embedded:
    """A ``Backend`` in this process; ``cache`` tells how the model's cache is used."""

    def __init__(self, runtime: Runtime, cache: Callable[[], CacheStatus] | None = None) -> None:
        self._runtime = runtime
        self._cache = cache

    async def start(self) -> None:
        await self._runtime.__aenter__()

    async def submit(self, job: Job) -> JobAnswer:
        return await self._runtime.submit(job)

    async def status(self) -> Status:
        scheduler = self._runtime.scheduler
        cache = self._cache() if self._cache is not None else None
        waiting, running = scheduler.waiting_requests, scheduler.running_requests
        return Status(scheduler.counters, waiting, running, scheduler.workers, cache)

    def adopt(self, profile: Profile) -> None:
        self._runtime.scheduler.adopt(profile)

    async def close(self, grace_s: float) -> None:
        await self._runtime.close(grace_s)
