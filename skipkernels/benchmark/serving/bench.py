"""The serving bench: contenders are compared by simulation, then on a real embedded server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from skipkernels.benchmark.serving.comparison import Progress, Result, compare
from skipkernels.benchmark.serving.contender import Contender
from skipkernels.benchmark.serving.decision_time import decision_times_ms
from skipkernels.benchmark.serving.server_run import EmbeddedServer, ServerRun, find_capacities, run_contenders
from skipkernels.benchmark.statistics import quantile
from skipkernels.modality.profile import Profile
from skipkernels.workloads.arrivals import Process
from skipkernels.workloads.workload import Workload

_SIMULATED = 0.15  # of the progress


@dataclass(frozen=True)
class Comparison:
    """Contenders under one workload.

    Args:
        simulated: at each contender's own rate, which the simulation finds, and under overload.
        capacity, overload: runs on the real server, by contender; empty: simulated only.
        overhead_ms: what the real server adds to each batch.
    """

    workload: Workload
    simulated: Sequence[Result]
    capacity: Sequence[ServerRun] = ()
    overload: Sequence[ServerRun] = ()
    overhead_ms: float = 0.0

    @property
    def results(self) -> list[Result]:
        """The real ones where there are any."""
        runs = zip(self.capacity, self.overload, strict=True)
        return [Result(at.contender.name, at.summary, over.summary) for at, over in runs] or list(self.simulated)

    def rows(self) -> list[dict[str, Any]]:
        """For each contender and load: the simulation that found the rate, and the real run beside a simulation of the
        same arrivals."""
        rows: list[dict[str, Any]] = []
        for result in self.simulated:
            for load, summary in (("capacity", result.capacity), ("overload", result.overload)):
                rows.append(self._row(result.contender, load, "simulated", asdict(summary)))
        for load, runs in (("capacity", self.capacity), ("overload", self.overload)):
            for run in runs:
                row = self._row(run.contender.name, load, "real", asdict(run.summary))
                row["wanted_per_s"] = run.requests_per_s
                row["promise_kept"] = run.summary.promise_kept
                row["skip_ratio"] = skip_ratio(run)
                row["same_arrivals_simulated"] = asdict(run.simulated_summary)
                row["deviations"] = run.deviations
                rows.append(row)
        return rows

    def _row(self, contender: str, load: str, source: str, figures: dict[str, Any]) -> dict[str, Any]:
        return {"slack": self.workload.slack, "contender": contender, "load": load, "source": source, **figures}


def run_comparison(
    contenders: Sequence[Contender],
    workload: Workload,
    *,
    overload_per_s: float,
    max_violations: float,
    process: Process,
    simulated_jobs: int,
    jobs: int,
    overload_jobs: int,
    rounds: int,
    seed: int,
    server: EmbeddedServer | None = None,
    progress: Progress = lambda stage, share: None,
) -> Comparison:
    """
    Args:
        server: None: simulated only.
        jobs, overload_jobs, rounds: of the runs on the real server, see ``run_contenders``.
    """
    simulated = compare(
        contenders,
        workload,
        overload_per_s=overload_per_s,
        max_violations=max_violations,
        jobs=simulated_jobs,
        process=process,
        seed=seed,
        progress=lambda stage, share: progress(f"simulated: {stage}", share * (_SIMULATED if server else 1.0)),
    )
    if server is None:
        return Comparison(workload, simulated)
    overhead_ms = server.overhead_ms(contenders[0].profile)
    found = [result.capacity.offered_per_s for result in simulated]
    settings: dict[str, Any] = {
        "rounds": rounds,
        "process": process,
        "seed": seed,
        "overhead_ms": overhead_ms,
    }
    half = (1.0 - _SIMULATED) / 2
    capacity = find_capacities(
        server,
        list(zip(contenders, found, strict=True)),
        workload,
        max_violations=max_violations,
        jobs=jobs,
        progress=lambda stage, share: progress(stage, _SIMULATED + half * share),
        **settings,
    )
    turns = iter(range(rounds * len(contenders)))
    overload = run_contenders(
        server,
        [(contender, overload_per_s) for contender in contenders],
        workload,
        jobs=overload_jobs,
        on_turn=lambda name: progress(
            f"{name}, overloaded", _SIMULATED + half * (1.0 + next(turns) / (rounds * len(contenders)))
        ),
        **settings,
    )
    return Comparison(workload, simulated, capacity, overload, overhead_ms)


def skip_ratio(run: ServerRun) -> float:
    """Share of the FFNs of all decoded labels that were skipped."""
    outcomes = [outcome for run in run.real for outcome in run]
    return fmean(one.output.skip_ratio for outcome in outcomes if outcome.answer for one in outcome.answer.answers)


def decision_rows(profile: Profile, policies: Sequence[str], requests: int = 256) -> list[dict[str, Any]]:
    """The decision time of each selection policy on queues with more or less tight deadlines."""
    return [
        {
            "policy": policy,
            "requests": requests,
            "deadlines_up_to": share,
            "decision_ms": median(times),
            "decision_ms_p95": quantile(times, 0.95),
        }
        for policy in policies
        for share, times in decision_times_ms(profile, policy, requests=requests).items()
    ]
