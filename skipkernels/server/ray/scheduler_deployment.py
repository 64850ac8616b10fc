"""The scheduler in a process of its own: the embedded runtime over replicas elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from skipkernels.errors import SkipkernelsError
from skipkernels.modality.job import Job, JobAnswer
from skipkernels.modality.profile import Profile
from skipkernels.modality.runtime import Runtime
from skipkernels.modality.scheduler import Admission
from skipkernels.server.http.backend import Embedded, Status
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.pending_request import PendingRequest
from skipkernels.server.ray.events import JobFailure
from skipkernels.server.ray.replica_worker import ReplicaWorker

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle


class SchedulerDeployment:
    """A deployment with one replica. When its process dies, Ray restarts it with an empty queue.

    Args:
        replicas: deployments of ``Replica``; each is one worker.
        restart_s: see ``ReplicaWorker``.
        selection, memory_bytes, admission: see ``Scheduler``.
    """

    def __init__(
        self,
        profile: Profile,
        replicas: Sequence[DeploymentHandle],
        restart_s: float,
        selection: str,
        memory_bytes: float | None,
        admission: Admission,
    ) -> None:
        self._workers = [ReplicaWorker(replica, restart_s) for replica in replicas]
        runtime = Runtime(profile, self._workers, selection, memory_bytes=memory_bytes, admission=admission)
        self._embedded = Embedded(runtime)
        self._starting: asyncio.Task[None] | None = None

    async def answer(self, job: Job, streamed: bool) -> AsyncIterator[str | JobAnswer | JobFailure]:
        """Yields the text of a job of one request as it is generated, where it is ``streamed``, and at the end its
        answer or failure."""
        await self._started()
        try:
            async with PendingRequest(self._embedded, job, lambda _: None, streamed=streamed) as pending:
                while (piece := await pending.next_piece()) is not None:
                    yield piece.text
                yield await pending.answer()
        except SkipkernelsError as error:
            failure = HttpError.of(error)
            yield JobFailure(failure.status, failure.code, str(failure), failure.param)

    async def status(self) -> Status:
        await self._started()
        return await self._embedded.status()

    async def close(self, grace_s: float) -> None:
        """See ``Backend.close``."""
        closing = asyncio.create_task(self._embedded.close(grace_s))
        await asyncio.wait([closing], timeout=grace_s)
        for worker in self._workers:
            worker.abandon()
        await closing

    async def _started(self) -> None:
        """Starts the runtime at the first call: its tasks need the event loop, which does not run in ``__init__``."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._embedded.start())
        await self._starting
