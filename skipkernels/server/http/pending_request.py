"""A request that is waiting for its answer from the backend."""

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
    """Submits a job of one request. Leaving the ``async with`` block before the answer has come cancels the job.

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
        with contextlib.suppress(
            asyncio.CancelledError, Exception
        ):  # the block was left for another reason, which is raised
            await self._answer

    async def next_piece(self) -> str | None:
        """The next piece of text as it is generated; None once, when the job is done."""
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
        """Asks the model to end this answer early. It is then incomplete, and ``answer`` raises."""
        self._cut_short = not self._answer.done()
        self._progress.given_up = self._progress.given_up or self._cut_short


def completion_of(answer: JobAnswer) -> tuple[Answer, Completion]:
    """The answer of a job of one request, and the model's output for it."""
    (only,) = answer.answers
    assert isinstance(only.output, Completion), f"a ChatModel puts out Completion objects, got {type(only.output)}"
    return only, only.output


def rest_of(completion: Completion, sent: str) -> str:
    """The text that remains to be sent after ``sent``.

    Raises:
        JobFailed: ``sent`` is not a prefix of the answer, because a retry gave a different one.
    """
    if not completion.text.startswith(sent):
        raise JobFailed(
            "a worker was lost after a part of this answer was sent, and the retry on another gave a different answer; "
            "send the request again"
        )
    return completion.text[len(sent) :]
