"""Open-loop load on a real service: jobs arrive at their times, whether or not earlier ones are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from skipkernels.modality.arrival import Arrival
from skipkernels.modality.clock import real_clock
from skipkernels.modality.errors import JobError, JobFailed, ServiceClosed
from skipkernels.modality.job import Job, JobAnswer
from skipkernels.modality.metrics import Outcome

Submit = Callable[[Job], Awaitable[JobAnswer]]
"""``Runtime.submit``, or a client of a server."""

Score = Callable[[Job, JobAnswer], Sequence[float]]
"""The metric on each of a job's answers."""


async def replay(arrivals: Sequence[Arrival], submit: Submit, score: Score = lambda job, answer: ()) -> list[Outcome]:
    """Submits each job at its time and waits for all of them; outcomes are in the order of ``arrivals``.

    If this process is busy, a job is submitted late, and timed from its submission. To detect that, compare the offered
    rate with the wanted one.

    Args:
        arrivals: in order of their times.
    """
    start_ms = real_clock()

    async def one(arrival: Arrival, at_ms: float) -> Outcome:
        try:
            answer = await submit(arrival.job)
        except (JobError, JobFailed, ServiceClosed) as error:
            return Outcome(at_ms, arrival.job, None, str(error))
        return Outcome(at_ms, arrival.job, answer, scores=tuple(score(arrival.job, answer)))

    running = []
    for arrival in arrivals:
        await asyncio.sleep(max(0.0, arrival.at_ms - (real_clock() - start_ms)) / 1e3)
        running.append(asyncio.create_task(one(arrival, real_clock() - start_ms)))
    return await asyncio.gather(*running)
