"""The cluster as the HTTP server's backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from skipkernels.chat.progress import progress_of
from skipkernels.modality.errors import WorkerLost
from skipkernels.modality.job import Job, JobAnswer
from skipkernels.modality.profile import Profile
from skipkernels.server.http.backend import Status
from skipkernels.server.http.errors import HttpError
from skipkernels.server.ray.events import JobFailure

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

_STATUS_S = 5.0  # a scheduler that is being restarted does not answer


class RayBackend:
    """A ``Backend`` for jobs of one request.

    Args:
        scheduler: a deployment of ``SchedulerDeployment``.
    """

    def __init__(self, scheduler: DeploymentHandle) -> None:
        self._scheduler = scheduler

    async def start(self) -> None:
        await self.status()

    async def submit(self, job: Job) -> JobAnswer:
        prompt = job.requests[0].inputs.get("text")
        grammar = getattr(prompt, "grammar", None)
        param = "n" if len(job.requests) > 1 else getattr(grammar, "param", None)
        if getattr(getattr(prompt, "sampling", None), "logprobs", None) is not None:
            param = "logprobs"
        if param is not None or grammar is not None:
            message = "on a cluster, a request has one answer, without log probabilities or a grammar"
            raise HttpError(400, "invalid_request", message, param)
        (request,) = job.requests
        progress = progress_of(request.inputs)
        progress.restart()
        plain = replace(job, requests=[replace(request, inputs=dict(request.inputs))])
        with _losses():
            events = self._scheduler.options(stream=True).answer.remote(plain, progress.streamed)
            try:
                async for event in cast(AsyncIterator[Any], events):
                    if isinstance(event, str):
                        progress.add(event)
                    elif isinstance(event, JobFailure):
                        raise HttpError(event.status, event.code, event.message, event.param)
                    else:
                        assert isinstance(event, JobAnswer)
                        return event
            finally:
                events.cancel()  # no effect if it has ended
        raise WorkerLost("the scheduler ended a request without an answer; send it again")

    async def status(self) -> Status:
        with _losses():
            async with asyncio.timeout(_STATUS_S):
                return await self._scheduler.status.remote()

    def adopt(self, profile: Profile) -> None:
        raise NotImplementedError("on a cluster, a profile is measured before the server listens")

    async def close(self, grace_s: float) -> None:
        with _losses():
            await self._scheduler.close.remote(grace_s)


@contextmanager
def _losses() -> Iterator[None]:
    """
    Raises:
        WorkerLost: Ray reports that the scheduler's process is gone.
    """
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        yield
    except (RayError, RayServeException, TimeoutError) as error:
        raise WorkerLost(
            "the scheduler's process and all requests it had accepted were lost; send the request again"
        ) from error
