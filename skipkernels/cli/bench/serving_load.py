"""The load of ``bench serving``: arrivals, requirements of jobs, and the contenders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipkernels.cli.bench.options import numbers

if TYPE_CHECKING:
    from skipkernels.benchmark.serving.contender import Contender
    from skipkernels.modality.profile import Profile
    from skipkernels.workloads.arrivals import Process
    from skipkernels.workloads.workload import Workload

_PANEL = "Load"


@dataclass(frozen=True)
class LoadOptions:
    """Jobs as in MOSEL's evaluation: sizes drawn from N(1, 6), rounded, at least 1."""

    process: Annotated[
        str,
        typer.Option(
            help="poisson, bursty, or a file with the arrival time of a job in each line, in seconds.",
            rich_help_panel=_PANEL,
        ),
    ] = "poisson"
    slack: Annotated[
        str,
        typer.Option(
            help="How far below full accuracy jobs may be answered, like 0.03; one comparison for each value.",
            rich_help_panel=_PANEL,
        ),
    ] = "0.03"
    extra_ms: Annotated[
        float,
        typer.Option(help="A job's deadline is its time alone with all modalities, plus this.", rich_help_panel=_PANEL),
    ] = 100.0
    overload: Annotated[
        float,
        typer.Option(
            min=0.01, help="Overload, as a multiple of the highest rate with all modalities.", rich_help_panel=_PANEL
        ),
    ] = 2.0
    max_violations: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Maximum share of late jobs.", rich_help_panel=_PANEL)
    ] = 0.01
    policies: Annotated[
        str, typer.Option(help="Selection policies to compare, separated by commas.", rich_help_panel=_PANEL)
    ] = "full,cheapest,random,maximize"
    simulated_jobs: Annotated[int, typer.Option(min=2, help="Jobs in each simulation.", rich_help_panel=_PANEL)] = 2000
    jobs: Annotated[
        int, typer.Option(min=2, help="Jobs in each real run at a contender's own rate.", rich_help_panel=_PANEL)
    ] = 100
    overload_jobs: Annotated[
        int,
        typer.Option(
            min=2,
            help="Jobs in each real run under overload. The longer it lasts, the longer queues grow.",
            rich_help_panel=_PANEL,
        ),
    ] = 300
    rounds: Annotated[
        int, typer.Option(min=1, help="Number of real runs of every contender.", rich_help_panel=_PANEL)
    ] = 3
    seed: Annotated[int, typer.Option(help="Seed of arrivals and sizes.", rich_help_panel=_PANEL)] = 0

    def __post_init__(self) -> None:
        if self.process not in ("poisson", "bursty") and not Path(self.process).is_file():
            raise typer.BadParameter(
                f"--process is poisson, bursty or a file of arrival times; there is no file {self.process!r}"
            )

    @property
    def slacks(self) -> list[float]:
        return numbers(self.slack, float, "--slack")

    def arrivals(self) -> Process:
        from skipkernels.workloads.arrivals import as_recorded, bursty, poisson, read_trace

        known: dict[str, Process] = {"poisson": poisson, "bursty": bursty}
        return known.get(self.process) or as_recorded(read_trace(self.process))

    def contenders(self, profile: Profile) -> list[Contender]:
        from skipkernels.benchmark.serving.contender import contenders

        return contenders(profile, self.policies.split(","))

    def workload(self, slack: float) -> Workload:
        from skipkernels.workloads.workload import Workload

        return Workload(extra_ms=self.extra_ms, slack=slack)

    def overload_per_s(self, profile: Profile) -> float:
        from skipkernels.modality.latency import LatencyModel

        latency = LatencyModel(profile)
        full = profile.strategies.index(profile.full(profile.modalities))
        return self.overload * 1e3 / latency.request_ms(max(latency.batch_limits))[full]
