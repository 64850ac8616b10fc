"""The runtime on workers that answer, fail, get lost and come back: no job without an answer or a reason."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from skipkernels.errors import RequestError
from skipkernels.modality.errors import AccuracyUnreachable, JobFailed, ServiceClosed, WorkerLost
from skipkernels.modality.job import Job, JobAnswer, Request
from skipkernels.modality.runtime import Runtime
from skipkernels.modality.strategy import Inputs, Strategy
from tests.modality.profiles import two_speeds

PROFILE = two_speeds()


def job(*values: object, deadline_ms: float = 1e5) -> Job:
    return Job([Request({"audio": value, "video": value}) for value in values], deadline_ms)


class Worker:
    """Answers with its inputs. What a request holds may be an exception to raise, once or always."""

    def __init__(self, *, comes_back: bool = True) -> None:
        self.batches: list[list[object]] = []
        self.closed = False
        self.go = asyncio.Event()
        self.go.set()
        self.back = asyncio.Event()
        self.back.set()
        self._comes_back = comes_back

    async def run(self, batch: Sequence[Inputs], strategy: Strategy) -> Sequence[Any]:
        values = [inputs["audio"] for inputs in batch]
        self.batches.append(values)
        await self.go.wait()
        await asyncio.sleep(0)
        for value in values:
            if isinstance(value, Exception):
                raise value
            if isinstance(value, list) and value:  # raises these one after the other
                raise value.pop(0)
        return values

    async def recover(self) -> None:
        await self.back.wait()
        if not self._comes_back:
            raise OSError("the machine is off")

    async def close(self) -> None:
        self.closed = True


def with_runtime(
    check: Callable[[Runtime, list[Worker]], Awaitable[None]], count: int = 1, *, comes_back: bool = True
) -> None:
    async def main() -> None:
        workers = [Worker(comes_back=comes_back) for _ in range(count)]
        async with Runtime(PROFILE, workers) as runtime:
            await check(runtime, workers)
        assert all(worker.closed for worker in workers)

    asyncio.run(asyncio.wait_for(main(), 20))


def outputs(answer: JobAnswer) -> list[object]:
    return [one.output for one in answer.answers]


@pytest.mark.parametrize("workers", [1, 3])
def test_answers_come_back_to_their_jobs(workers: int) -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        answers = await asyncio.gather(*(runtime.submit(job(number, -number)) for number in range(50)))
        assert [outputs(answer) for answer in answers] == [[number, -number] for number in range(50)]
        for answer in answers:
            assert answer.deadline_met
            assert not any(one.retried for one in answer.answers)
        assert all(worker.batches for worker in workers)
        assert runtime.scheduler.counters.answered == 50

    with_runtime(check, workers)


def test_a_request_that_breaks_the_model_breaks_no_other() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        workers[0].go.clear()
        first = asyncio.create_task(runtime.submit(job("first")))
        await asyncio.sleep(0.01)
        broken = asyncio.create_task(runtime.submit(job("good", ValueError("no such token"))))
        fine = asyncio.create_task(runtime.submit(job("fine")))
        await asyncio.sleep(0.01)
        workers[0].go.set()
        with pytest.raises(
            JobFailed, match=r"the model failed, also when the request ran alone: ValueError\('no such token'"
        ):
            await broken
        assert outputs(await first) == ["first"]
        assert outputs(await fine) == ["fine"]
        assert any(len(batch) > 1 and "good" in batch for batch in workers[0].batches)

    with_runtime(check)


def test_requests_of_a_lost_worker_run_again() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        answer = await runtime.submit(job([WorkerLost("killed")], 1))
        assert outputs(answer) == [[], 1]
        assert all(one.retried for one in answer.answers)
        assert runtime.scheduler.counters.retried_requests == 2
        assert runtime.scheduler.workers == 1

    with_runtime(check)


def test_a_request_that_loses_two_workers_fails() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        with pytest.raises(JobFailed, match="its worker was lost, also on the retry: killed"):
            await runtime.submit(job(WorkerLost("killed")))
        assert outputs(await runtime.submit(job("next"))) == ["next"]

    with_runtime(check)


def test_idle_workers_take_over_while_a_lost_one_comes_back() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        for worker in workers:
            worker.back.clear()
        assert outputs(await runtime.submit(job([WorkerLost("killed")]))) == [[]]
        for worker in workers:
            worker.back.set()

    with_runtime(check, count=2)


def test_a_worker_that_stays_away_is_done_without() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        answers = await asyncio.gather(
            runtime.submit(job([WorkerLost("killed")])), *(runtime.submit(job(number)) for number in range(20))
        )
        assert len(answers) == 21
        assert runtime.scheduler.workers == 1

    with_runtime(check, count=2, comes_back=False)


def test_without_workers_every_job_fails_with_the_reason() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        results = await asyncio.gather(
            *(runtime.submit(job([WorkerLost("killed")], number)) for number in range(20)), return_exceptions=True
        )
        for result in results:
            assert isinstance(result, JobFailed)
            assert "no worker is left; the last one did not come back: OSError('the machine is off')" in str(result)
        with pytest.raises(ServiceClosed, match="no jobs are taken: no worker is left"):
            await runtime.submit(job(1))

    with_runtime(check, comes_back=False)


def test_a_refused_job_raises_at_once() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        with pytest.raises(AccuracyUnreachable, match=r"at most 0\.8949 can; ask"):
            await runtime.submit(Job([Request({"audio": 1, "video": 1})], 10.0, 0.99))
        assert workers[0].batches == []

    with_runtime(check)


def test_a_caller_who_leaves_takes_the_job_along() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        workers[0].go.clear()
        running, waiting, kept = (
            asyncio.create_task(runtime.submit(job(*[name] * 9))) for name in ("running", "waiting", "kept")
        )
        await asyncio.sleep(0.01)
        for task in (running, waiting):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        workers[0].go.set()
        assert outputs(await kept) == ["kept"] * 9
        assert "waiting" not in {value for batch in workers[0].batches for value in batch}
        counters = runtime.scheduler.counters
        assert (counters.accepted, counters.answered, counters.failed) == (3, 1, 2)

    with_runtime(check)


def test_closing_answers_what_was_accepted() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        tasks = [asyncio.create_task(runtime.submit(job(number, [WorkerLost("killed")]))) for number in range(20)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(runtime.close())
        await asyncio.sleep(0)
        with pytest.raises(ServiceClosed, match="the service is shutting down"):
            await runtime.submit(job(1))
        await closing
        assert [outputs(await task)[0] for task in tasks] == list(range(20))

    with_runtime(check, count=2)


def test_closing_without_grace_fails_what_waits_and_answers_what_runs() -> None:
    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        workers[0].go.clear()
        running = asyncio.create_task(runtime.submit(job("running")))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(runtime.submit(job("waiting")))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(runtime.close(grace_s=0.02))
        with pytest.raises(JobFailed, match=r"the service shut down, and its 0.02 s of grace are over"):
            await waiting
        workers[0].go.set()
        await closing
        assert outputs(await running) == ["running"]

    with_runtime(check)


def test_a_model_with_the_wrong_number_of_outputs_is_an_error() -> None:
    class Short(Worker):
        async def run(self, batch: Sequence[Inputs], strategy: Strategy) -> Sequence[Any]:
            return [1] * (len(batch) - 1)

    async def main() -> None:
        async with Runtime(PROFILE, [Short()]) as runtime:
            with pytest.raises(JobFailed, match="0 outputs for 1 requests"):
                await runtime.submit(job(1, 2))

    asyncio.run(main())


def test_a_runtime_has_to_be_started() -> None:
    async def main() -> None:
        with pytest.raises(ServiceClosed, match="it has not been started"):
            await Runtime(PROFILE, [Worker()]).submit(job(1))

    asyncio.run(main())


def test_a_fault_of_the_scheduler_strands_no_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Runtime(PROFILE, [Worker()]) as runtime:
            await runtime.submit(job(1))
            monkeypatch.setattr(runtime.scheduler, "finish", lambda batch, outputs: 1 / 0)
            with pytest.raises(JobFailed, match="the scheduler failed: ZeroDivisionError"):
                await runtime.submit(job(2))
            with pytest.raises(ServiceClosed, match="the scheduler failed"):
                await runtime.submit(job(3))

    with pytest.raises(ZeroDivisionError):
        asyncio.run(main())


@pytest.mark.parametrize("seed", range(5))
def test_under_random_faults_each_job_is_answered_or_fails(seed: int) -> None:
    draw = random.Random(seed)

    def value(number: int) -> object:
        kind = draw.random()
        if kind < 0.05:
            return draw.choice([WorkerLost("killed"), ValueError("broken")])
        if kind < 0.15:
            return [draw.choice([WorkerLost("killed"), ValueError("broken")])]
        return number

    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        async def one(number: int) -> str:
            await asyncio.sleep(draw.random() / 20)
            values = [value(number) for _ in range(draw.randint(1, 12))]
            task = asyncio.create_task(runtime.submit(job(*values, deadline_ms=draw.uniform(1, 200))))
            if draw.random() < 0.1:
                await asyncio.sleep(draw.random() / 100)
                task.cancel()
            try:
                answer = await task
            except JobFailed:
                assert any(not isinstance(value, int) for value in values)
                return "failed"
            except asyncio.CancelledError:
                return "cancelled"
            assert outputs(answer) == values
            return "answered"

        ends = await asyncio.gather(*(one(number) for number in range(150)))
        counters = runtime.scheduler.counters
        assert counters.accepted == 150 == counters.answered + counters.failed
        answered, cancelled = ends.count("answered"), ends.count("cancelled")
        assert answered > 50
        assert ends.count("failed") > 10
        assert answered <= counters.answered <= answered + cancelled  # some were answered as they left
        assert counters.retried_requests > 10
        assert runtime.scheduler.waiting_requests == 0

    with_runtime(check, count=3)


def test_what_the_model_refuses_is_refused_once() -> None:
    """A refusal is the request's own fault: it is told as it is, and nobody tries again."""

    async def check(runtime: Runtime, workers: list[Worker]) -> None:
        workers[0].go.clear()
        first = asyncio.create_task(runtime.submit(job("first")))
        await asyncio.sleep(0.01)
        refused = asyncio.create_task(runtime.submit(job("good", RequestError("no such token"))))
        fine = asyncio.create_task(runtime.submit(job("fine")))
        await asyncio.sleep(0.01)
        workers[0].go.set()
        with pytest.raises(RequestError, match=r"^no such token$"):
            await refused
        assert outputs(await fine) == ["fine"]
        assert outputs(await first) == ["first"]
        tried = [batch for batch in workers[0].batches if any(isinstance(value, RequestError) for value in batch)]
        assert len(tried[-1]) == 1, "of several requests it is not known whose fault it was: each is tried alone"
        counters = runtime.scheduler.counters
        assert (counters.answered, counters.failed) == (2, 1)

    with_runtime(check)
