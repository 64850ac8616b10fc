"""The same arrivals simulated and on the embedded runtime: their figures agree within 10 %."""

import asyncio
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import pytest

from skipkernels.benchmark.serving.load import replay
from skipkernels.modality.job import Job
from skipkernels.modality.metrics import Summary, summarise
from skipkernels.modality.profiler import Sample, measure_profile
from skipkernels.modality.runtime import Runtime
from skipkernels.modality.simulator import simulate
from skipkernels.modality.strategy import Inputs, Strategy, all_strategies
from skipkernels.modality.thread_worker import ThreadWorker
from skipkernels.workloads.arrivals import poisson
from skipkernels.workloads.workload import Workload


class Sleeper:
    """Sleeps 6 ms, and 20 ms for each request with video, 5 ms with audio alone; is wrong on a tenth, or a fifth."""

    name, fingerprint, device, dtype = "sleeper", "s-2", "cpu", "fp32"
    modalities = ("audio", "video")
    strategies: tuple[Strategy, ...] = all_strategies(("audio", "video"))[:2]

    def run(self, batch: Sequence[Inputs], strategy: Strategy) -> Sequence[Any]:
        video = "video" in strategy.modalities
        time.sleep((6.0 + len(batch) * (20.0 if video else 5.0)) / 1e3)
        return [bool((inputs["audio"] or 0) % (10 if video else 5)) for inputs in batch]

    def score(self, output: Any, expected: Any) -> float:
        return float(output == expected)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "requests_per_s"), [("maximize", 16), ("maximize", 60), ("full", 24)])
def test_simulation_and_runtime_agree(policy: str, requests_per_s: float) -> None:
    samples = [Sample({"audio": number, "video": number}, True) for number in range(200)]
    profile = measure_profile(Sleeper(), samples, rounds=10, memory=False)
    workload = Workload(extra_ms=140.0, slack=0.15)
    rng = np.random.default_rng(5)
    sizes = workload.sizes(250, rng)
    times = poisson(requests_per_s / np.mean(sizes), 250, rng)
    arrivals = workload.arrivals(times, sizes, profile)

    async def served() -> tuple[float, Summary]:
        """What the runtime adds to a batch when nothing else waits, and the run."""
        async with Runtime(profile, [ThreadWorker(Sleeper())], policy) as runtime:
            alone = [await runtime.submit(Job(arrivals[0].job.requests[:1])) for _ in range(30)]
            overhead_ms = median(answer.time_ms for answer in alone) - profile.strategies[0].median_ms(1)
            return overhead_ms, summarise(await replay(arrivals, runtime.submit))

    overhead_ms, real = asyncio.run(served())
    simulated = summarise(simulate(arrivals, profile, policy, overhead_ms=overhead_ms))
    assert real.lost == 0
    assert real.offered_per_s == pytest.approx(simulated.offered_per_s, rel=0.02)  # the load generator kept up
    assert real.throughput_per_s == pytest.approx(simulated.throughput_per_s, rel=0.1)
    assert real.completion_mean_ms == pytest.approx(simulated.completion_mean_ms, rel=0.1)
    assert real.completion_p99_ms == pytest.approx(simulated.completion_p99_ms, rel=0.1)
    assert real.promised_accuracy == pytest.approx(simulated.promised_accuracy, rel=0.1)
    assert real.violation_ratio == pytest.approx(simulated.violation_ratio, abs=0.1)
