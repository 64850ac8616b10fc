"""Runs contenders on a real embedded server, in turns, on the same arrivals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle
from statistics import median

from skipkernels.benchmark.serving.comparison import Load, Progress
from skipkernels.benchmark.serving.contender import Contender
from skipkernels.benchmark.serving.load import replay
from skipkernels.modality.arrival import Arrival
from skipkernels.modality.job import Job, JobAnswer, Request
from skipkernels.modality.metrics import Outcome, Summary, summarise
from skipkernels.modality.profile import Profile
from skipkernels.modality.profiler import Sample
from skipkernels.modality.runtime import Runtime
from skipkernels.modality.simulator import simulate
from skipkernels.modality.strategy import ModalityModel
from skipkernels.modality.thread_worker import ThreadWorker
from skipkernels.workloads.arrivals import Process, poisson
from skipkernels.workloads.workload import Workload

_ALONE = 30  # requests to measure the server's overhead with


@dataclass
class ServerRun:
    """One contender at one rate: the outcomes of its jobs on the real server and in a simulation, by round."""

    contender: Contender
    requests_per_s: float  # wanted
    real: list[list[Outcome]] = field(default_factory=list)  # by round
    simulated: list[list[Outcome]] = field(default_factory=list)

    @property
    def summary(self) -> Summary:
        return summarise(*self.real)

    @property
    def simulated_summary(self) -> Summary:
        return summarise(*self.simulated)

    @property
    def deviations(self) -> dict[str, float]:
        """Real / simulated - 1, by figure; for ratios and accuracies, the difference."""
        real, simulated = self.summary, self.simulated_summary
        relative = ("throughput_per_s", "completion_mean_ms", "completion_p99_ms")
        absolute = ("violation_ratio", "promised_accuracy")
        return {
            **{name: getattr(real, name) / getattr(simulated, name) - 1.0 for name in relative},
            **{name: getattr(real, name) - getattr(simulated, name) for name in absolute},
        }


class EmbeddedServer:
    """A model on the embedded runtime, under load from held-out samples.

    Args:
        samples: the requests' inputs, used in rotation.
    """

    def __init__(self, model: ModalityModel, samples: Sequence[Sample]) -> None:
        self._model = model
        self._samples = samples
        self._expected = {id(sample.inputs): sample.expected for sample in samples}

    def requests(self) -> Callable[[], Request]:
        """Makes requests from the samples, beginning with the first."""
        taken = cycle(self._samples)
        return lambda: Request(next(taken).inputs)

    def run(self, arrivals: Sequence[Arrival], contender: Contender) -> list[Outcome]:
        return asyncio.run(self._run(arrivals, contender))

    def overhead_ms(self, profile: Profile) -> float:
        """Time that the server adds to a request when it is idle otherwise."""
        make = self.requests()
        alone = asyncio.run(self._alone([Job([make()]) for _ in range(_ALONE)], profile))
        return max(0.0, alone - profile.full(profile.modalities).median_ms(1))

    async def _run(self, arrivals: Sequence[Arrival], contender: Contender) -> list[Outcome]:
        async with Runtime(contender.profile, [ThreadWorker(self._model)], contender.selection) as runtime:
            return await replay(arrivals, runtime.submit, self._score)

    async def _alone(self, jobs: Sequence[Job], profile: Profile) -> float:
        async with Runtime(profile, [ThreadWorker(self._model)], "full") as runtime:
            return median([(await runtime.submit(job)).time_ms for job in jobs])

    def _score(self, job: Job, answer: JobAnswer) -> list[float]:
        return [
            self._model.score(one.output, self._expected[id(request.inputs)])
            for request, one in zip(job.requests, answer.answers, strict=True)
        ]


def run_contenders(
    server: EmbeddedServer,
    rates: Sequence[tuple[Contender, float]],
    workload: Workload,
    *,
    jobs: int,
    rounds: int,
    process: Process = poisson,
    seed: int = 0,
    overhead_ms: float = 0.0,
    on_turn: Callable[[str], None] = lambda name: None,
) -> list[ServerRun]:
    """Each round draws jobs and runs all contenders on them, one after the other, in rotating order.

    Args:
        rates: requests per second of each contender; the same draws, scaled in time.
        jobs: in a round.
        seed: of the first round; incremented for each further one.
        overhead_ms: for the simulations, see ``EmbeddedServer.overhead_ms``.
        on_turn: called with the contender's name before its turn.
    """
    runs = [ServerRun(contender, rate) for contender, rate in rates]
    for number in range(rounds):
        load = Load.draw(workload, jobs, seed + number, process)
        for offset in range(len(runs)):
            run = runs[(number + offset) % len(runs)]
            contender = run.contender
            on_turn(contender.name)
            arrivals = load.arrivals(workload, contender.profile, run.requests_per_s, server.requests())
            run.real.append(server.run(arrivals, contender))
            run.simulated.append(
                simulate(arrivals, contender.profile, contender.selection, overhead_ms=overhead_ms, seed=seed + number)
            )
    return runs


def find_capacities(
    server: EmbeddedServer,
    rates: Sequence[tuple[Contender, float]],
    workload: Workload,
    *,
    max_violations: float,
    step: float = 0.85,
    tries: int = 4,
    jobs: int,
    rounds: int,
    process: Process = poisson,
    seed: int = 0,
    overhead_ms: float = 0.0,
    progress: Progress = lambda stage, share: None,
) -> list[ServerRun]:
    """The highest rate at which each contender stays within ``max_violations`` on the real server.

    Starts from ``rates``, which a simulation has found, and multiplies by ``step`` until it does. After ``tries``, the
    last rate is taken in any case.

    Args:
        jobs, rounds, process, seed, overhead_ms: as for ``run_contenders``.
    """
    found: dict[str, ServerRun] = {}
    wanted = list(rates)
    for attempt in range(tries):
        turns = count()
        total = rounds * len(wanted)
        tried = run_contenders(
            server,
            wanted,
            workload,
            jobs=jobs,
            rounds=rounds,
            process=process,
            seed=seed,
            overhead_ms=overhead_ms,
            on_turn=lambda name: progress(
                f"{name} at its rate",
                (attempt + next(turns) / total) / tries,  # noqa: B023
            ),
        )
        found |= {run.contender.name: run for run in tried}
        wanted = [
            (run.contender, step * run.requests_per_s) for run in tried if run.summary.violation_ratio > max_violations
        ]
        if not wanted:
            break
    return [found[contender.name] for contender, _ in rates]
