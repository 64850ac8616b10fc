"""Runs the scheduler on real workers, in one event loop. No accepted job is lost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from types import TracebackType

from skipkernels.errors import RequestError
from skipkernels.modality.clock import real_clock
from skipkernels.modality.errors import JobFailed, ServiceClosed, WorkerLost
from skipkernels.modality.job import Job, JobAnswer
from skipkernels.modality.policies import SelectionPolicy
from skipkernels.modality.profile import Profile
from skipkernels.modality.scheduler import Admission, Scheduler
from skipkernels.modality.ticket import Batch, Ticket
from skipkernels.modality.worker import SlotWorker, Worker

_REVIEW_S = 0.05  # between two looks at the deadlines of what runs; a few decode steps


class Runtime:
    """Owns a scheduler and the workers it plans for; ``async with`` starts and closes it.

    Every accepted job is answered or fails with a reason. A request whose batch failed is retried once, alone. A worker
    that does not recover is removed from the plan; when the last one is gone, all remaining jobs fail.

    Args:
        workers: all with the profile's model and device, and of one kind: they run whole batches, or requests one by
            one in slots.
        selection, memory_bytes, admission: as in ``Scheduler``.
    """

    def __init__(
        self,
        profile: Profile,
        workers: Sequence[Worker] | Sequence[SlotWorker],
        selection: str | SelectionPolicy = "maximize",
        *,
        memory_bytes: float | None = None,
        admission: Admission = "accuracy",
    ) -> None:
        slots = [worker.slots for worker in workers if isinstance(worker, SlotWorker)]
        assert not slots or slots == [slots[0]] * len(workers), f"workers must be of one kind, got slots {slots}"
        self._slots = slots[0] if slots else None
        self.scheduler = Scheduler(
            profile,
            real_clock,
            selection,
            workers=len(workers) * (self._slots or 1),
            slots=self._slots,
            memory_bytes=memory_bytes,
            admission=admission,
        )
        self._workers: Sequence[Worker | SlotWorker] = workers
        self._answers: dict[Ticket, asyncio.Future[JobAnswer]] = {}
        self._refusals: dict[Ticket, RequestError] = {}  # by the model, of tickets that are not settled yet
        self._wakeup = asyncio.Event()  # set when there may be a batch to run
        self._tasks: list[asyncio.Task[None]] = []
        self._reviewing: asyncio.Task[None] | None = None
        self._closed: str | None = "it has not been started"

    async def __aenter__(self) -> Runtime:
        self._closed = None
        # slots are numbered across the workers, so that requests spread over them
        numbers = range(len(self._workers) * (self._slots or 1))
        self._tasks = [asyncio.create_task(self._work(number, self._worker(number))) for number in numbers]
        if self._slots is not None:
            self._reviewing = asyncio.create_task(self._review())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def submit(self, job: Job) -> JobAnswer:
        """Waits for a job's answer. Cancelling this call cancels the job.

        Raises:
            JobError: refused, see ``Scheduler.submit``.
            ServiceClosed: after ``close`` began, or without workers.
            RequestError: accepted, and then refused by the model.
            JobFailed: accepted, but not answered.
        """
        if self._closed:
            raise ServiceClosed(f"no jobs are taken: {self._closed}")
        ticket = self.scheduler.submit(job)
        answer = self._answers[ticket] = asyncio.get_running_loop().create_future()
        self._wakeup.set()
        try:
            return await answer
        except asyncio.CancelledError:
            if not ticket.done:
                self.scheduler.cancel(ticket, "cancelled by the caller")
                self._drop(ticket)
            self._answers.pop(ticket, None)
            raise

    async def close(self, grace_s: float = math.inf) -> None:
        """Takes no more jobs, and ends when every accepted one is answered or failed and the workers are closed.

        Args:
            grace_s: how long waiting jobs may still be started. Batches that run are always waited for.
        """
        self._closed = self._closed or "the service is shutting down"
        self._wakeup.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=None if grace_s == math.inf else grace_s)
            for ticket in list(self._answers):
                if self.scheduler.waits(ticket):
                    self._fail(ticket, f"the service shut down, and its {grace_s:g} s of grace are over")
            await asyncio.wait(self._tasks)
        self._fail_all("the service shut down, and no worker is left for it")
        if self._reviewing is not None:
            self._reviewing.cancel()
            await asyncio.wait([self._reviewing])
        for worker in self._workers:
            await worker.close()
        for task in self._tasks:
            task.result()
        self._tasks = []

    def _worker(self, number: int) -> Worker | SlotWorker:
        return self._workers[number % len(self._workers)]

    async def _review(self) -> None:
        while True:
            await asyncio.sleep(_REVIEW_S)
            for batch in self.scheduler.review():
                worker = self._worker(batch.worker)
                assert isinstance(worker, SlotWorker), "only requests in slots change their strategy"
                worker.move(batch.inputs[0], batch.strategy)

    def _drop(self, ticket: Ticket) -> None:
        """Slots of a job that nobody waits for are free soon; a batch runs to its end."""
        for batch in self.scheduler.batches_of(ticket):
            worker = self._worker(batch.worker)
            if isinstance(worker, SlotWorker):
                worker.drop(batch.inputs[0])

    async def _work(self, number: int, worker: Worker | SlotWorker) -> None:
        try:
            while await self._work_once(number, worker):
                pass
        except BaseException as error:
            self._closed = f"the scheduler failed: {error!r}"
            self._fail_all(self._closed)
            raise

    async def _work_once(self, number: int, worker: Worker | SlotWorker) -> bool:
        """Runs a batch or waits for one; False: this worker stops."""
        self._wakeup.clear()
        batch = self.scheduler.next_batch(number)
        if batch is None:
            if self._closed:
                return False
            await self._wakeup.wait()
            return True
        try:
            if isinstance(worker, SlotWorker):
                outputs = [await worker.answer(batch.inputs[0], batch.strategy, batch.deadline_ms)]
            else:
                outputs = list(await worker.run(batch.inputs, batch.strategy))
            if len(outputs) != len(batch.members):
                raise RuntimeError(f"{len(outputs)} outputs for {len(batch.members)} requests")
        except WorkerLost as error:
            self._retry(batch, f"its worker was lost, also on the retry: {error}")
            return await self._recover(number, worker)
        except RequestError as error:
            self._refuse(batch, error)
            return True
        except Exception as error:
            self._retry(batch, f"the model failed, also when the request ran alone: {error!r}")
            return True
        for ticket in self.scheduler.finish(batch, outputs):
            self._settle(ticket)
        return True

    def _retry(self, batch: Batch, reason: str) -> None:
        for ticket in self.scheduler.fail(batch, reason):
            self._settle(ticket)
        self._wakeup.set()  # other workers can take the retries

    def _refuse(self, batch: Batch, error: RequestError) -> None:
        """The model says that it cannot serve a request. Of several it is not known which: each is tried alone."""
        if len(batch.members) > 1:
            self._retry(batch, str(error))
            return
        ((ticket, _),) = batch.members
        self._refusals[ticket] = error
        for failed in self.scheduler.refuse(batch, str(error)):
            self._settle(failed)

    async def _recover(self, number: int, worker: Worker | SlotWorker) -> bool:
        try:
            await worker.recover()
        except Exception as error:
            self.scheduler.retire(number)
            if not self.scheduler.workers:
                self._closed = f"no worker is left; the last one did not come back: {error!r}"
                self._fail_all(self._closed)
            return False
        return True

    def _fail_all(self, reason: str) -> None:
        for ticket in list(self._answers):
            self._fail(ticket, reason)

    def _fail(self, ticket: Ticket, reason: str) -> None:
        self.scheduler.cancel(ticket, reason)
        self._settle(ticket)

    def _settle(self, ticket: Ticket) -> None:
        """Passes the answer or failure of a done ticket to its caller."""
        answer, refusal = self._answers.pop(ticket), self._refusals.pop(ticket, None)
        if answer.done():
            return  # the caller was cancelled
        if ticket.answer is not None:
            answer.set_result(ticket.answer)
        elif refusal is not None:
            answer.set_exception(refusal)
        else:
            answer.set_exception(JobFailed(f"job {ticket.number} failed: {ticket.failure}"))
