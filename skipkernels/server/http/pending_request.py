"""A request that is waiting for its answer from the backend."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from skipkernels.chat.progress import ChatInputs, LiveProgress, Piece
from skipkernels.modality.errors import ServiceClosed
from skipkernels.modality.job import Job, JobAnswer
from skipkernels.server.http.backend import Backend


class PendingRequest:
    """Submits a job. Leaving the ``async with`` block before the answer has come cancels the job.

    Args:
        on_exit: called when the block is left.
        streamed: whether its pieces are wanted; else there are none.
    """

    def __init__(
        self, backend: Backend, job: Job, on_exit: Callable[[PendingRequest], None], *, streamed: bool = True
    ) -> None:
        self._pieces = asyncio.Queue[Piece | None]()
        self._progress = [LiveProgress(self._pieces, index, streamed=streamed) for index in range(len(job.requests))]
        watched = [
            replace(request, inputs=ChatInputs(request.inputs, progress))
            for request, progress in zip(job.requests, self._progress, strict=True)
        ]
        self._answer = asyncio.create_task(backend.submit(replace(job, requests=watched)))
        self._answer.add_done_callback(lambda _: self._pieces.put_nowait(None))
        self._cut_short = False
        self._on_exit = on_exit

    async def __aenter__(self) -> PendingRequest:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on_exit(self)
        self._give_up()
        self._answer.cancel()
        with contextlib.suppress(
            asyncio.CancelledError, Exception
        ):  # the block was left for another reason, which is raised
            await self._answer

    async def next_piece(self) -> Piece | None:
        """The next piece of text as it is generated; None once, when the job is done."""
        return await self._pieces.get()

    async def answer(self) -> JobAnswer:
        """
        Raises:
            JobError, ServiceClosed, JobFailed, WorkerLost: see ``Backend.submit``.
        """
        answer = await self._answer
        if self._cut_short:
            raise ServiceClosed("the service shut down before the answer was complete")
        return answer

    def cut_short(self) -> None:
        """Asks the model to end this answer early. It is then incomplete, and ``answer`` raises."""
        self._cut_short = not self._answer.done()
        if self._cut_short:
            self._give_up()

    def _give_up(self) -> None:
        for progress in self._progress:
            progress.given_up = True
