"""The load of ``bench serving``: when jobs come, what they ask for, and who competes for serving them."""

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
    """Jobs in the manner of the original's evaluation: sizes of N(1, 6), rounded and at least 1."""

    process: Annotated[
        str,
        typer.Option(
            help="poisson, bursty, or a file with the arrival time of a job in each line, in seconds.",
            rich_help_panel=_PANEL,
        ),
    ] = "poisson"
    slack: Annotated[
        str, typer.Option(help="Points of accuracy that jobs do without; a comparison each.", rich_help_panel=_PANEL)
    ] = "0.03"
    extra_ms: Annotated[
        float,
        typer.Option(help="A job may take as long as with full modality alone, and this.", rich_help_panel=_PANEL),
    ] = 100.0
    overload: Annotated[
        float,
        typer.Option(min=0.01, help="As a multiple of what full modality can serve at most.", rich_help_panel=_PANEL),
    ] = 2.0
    max_violations: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of jobs that may be late.", rich_help_panel=_PANEL)
    ] = 0.01
    policies: Annotated[str, typer.Option(help="Compared, separated by commas.", rich_help_panel=_PANEL)] = (
        "full,cheapest,random,maximize"
    )
    simulated_jobs: Annotated[int, typer.Option(min=2, help="Of each simulation.", rich_help_panel=_PANEL)] = 2000
    jobs: Annotated[
        int, typer.Option(min=2, help="Of each real run at a contender's own rate.", rich_help_panel=_PANEL)
    ] = 100
    overload_jobs: Annotated[
        int,
        typer.Option(
            min=2,
            help="Of each real run under overload: the longer it lasts, the longer wait who cannot keep up.",
            rich_help_panel=_PANEL,
        ),
    ] = 300
    rounds: Annotated[int, typer.Option(min=1, help="Real runs of every contender.", rich_help_panel=_PANEL)] = 3
    seed: Annotated[int, typer.Option(help="Of arrivals and sizes.", rich_help_panel=_PANEL)] = 0

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
