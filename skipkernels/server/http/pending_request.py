"""One request on its way through the backend, seen from the client's side."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from skipkernels.chat.chat import Completion
from skipkernels.chat.progress import ChatInputs, LiveProgress
from skipkernels.modality.errors import JobFailed, ServiceClosed
from skipkernels.modality.job import Answer, Job, JobAnswer
from skipkernels.server.http.backend import Backend


class PendingRequest:
    """Submits a job of one request; leaving the ``async with`` block before the answer is there gives the job up.

    Args:
        on_exit: called when the block is left.
    """

    def __init__(self, backend: Backend, job: Job, on_exit: Callable[[PendingRequest], None]) -> None:
        self._progress = LiveProgress()
        (request,) = job.requests
        watched = replace(request, inputs=ChatInputs(request.inputs, self._progress))
        self._answer = asyncio.create_task(backend.submit(replace(job, requests=[watched])))
        self._answer.add_done_callback(lambda _: self._progress.end())
        self._cut_short = False
        self._on_exit = on_exit

    async def __aenter__(self) -> PendingRequest:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on_exit(self)
        self._progress.given_up = True
        self._answer.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # who left early has a reason of its own
            await self._answer

    async def next_piece(self) -> str | None:
        """Text of the answer as it comes; None once, when the job is done."""
        return await self._progress.next_piece()

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
        """Asks the model to end this answer early; it is worth nothing then, and fails."""
        self._cut_short = not self._answer.done()
        self._progress.given_up = self._progress.given_up or self._cut_short


def completion_of(answer: JobAnswer) -> tuple[Answer, Completion]:
    """The only answer of a job of one request, and what the model put out for it."""
    (only,) = answer.answers
    assert isinstance(only.output, Completion), f"a ChatModel puts out Completion objects, got {type(only.output)}"
    return only, only.output


def rest_of(completion: Completion, sent: str) -> str:
    """What is still to be sent when ``sent`` has been.

    Raises:
        JobFailed: that was the beginning of another answer: a retry came out differently.
    """
    if not completion.text.startswith(sent):
        raise JobFailed(
            "a worker was lost after a part of this answer was sent, and the answer came out differently on another; "
            "ask again"
        )
    return completion.text[len(sent) :]
