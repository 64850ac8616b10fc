"""MOSEL's two figures on the embedded server at given rates, in a minute and a half: requests/s with hardly any job
late, and how long jobs take under overload, by `full` and by `maximize`. `skipkernels bench serving` searches rates.

    python bench/serving_headlines.py DIR --capacity 9,80 --overload 66
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from skipkernels.benchmark.serving.contender import Contender
from skipkernels.benchmark.serving.server_run import EmbeddedServer, ServerRun, run_contenders
from skipkernels.cli.bench.options import DeviceOptions
from skipkernels.cli.bench.serving_workload import ModelOptions
from skipkernels.workloads.workload import Workload


def figures(load: str, run: ServerRun) -> dict[str, Any]:
    summary = run.summary
    told = {"load": load, "contender": run.contender.name, "wanted_per_s": run.requests_per_s}
    return told | {"promise_kept": summary.promise_kept, **asdict(summary), "simulated": asdict(run.simulated_summary)}


def main(
    model_dir: Annotated[Path, typer.Argument(help="Of `skipkernels bench serving`; trained and profiled if missing.")],
    capacity: Annotated[str, typer.Option(help="Requests/s of full and of maximize.")] = "9,80",
    overload: Annotated[float, typer.Option(help="Requests/s of both.")] = 66.0,
    jobs: int = 60,
    overload_jobs: int = 200,
    profile_samples: int = 400,
    profile_rounds: int = 4,
    threads: int = 1,
    extra_ms: float = 200.0,
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    options = ModelOptions(model_dir=model_dir, profile_samples=profile_samples, profile_rounds=profile_rounds)
    model, profile = options.fusion(DeviceOptions(threads=threads).execution())
    server = EmbeddedServer(model, options.held_out())
    both = [Contender(name, name, profile) for name in ("full", "maximize")]
    workload, overhead_ms = Workload(extra_ms=extra_ms), server.overhead_ms(profile)
    own = list(zip(both, map(float, capacity.split(",")), strict=True))
    runs = [
        *(("overload", run) for run in run_contenders(
            server, [(one, overload) for one in both], workload, jobs=overload_jobs, rounds=1, overhead_ms=overhead_ms
        )),
        *(("capacity", run) for run in run_contenders(
            server, own, workload, jobs=jobs, rounds=1, seed=3, overhead_ms=overhead_ms
        )),
    ]  # fmt: skip
    found = [figures(load, run) for load, run in runs]
    shown = ("throughput_per_s", "violation_ratio", "completion_mean_ms", "required_accuracy", "achieved_accuracy")
    table = Table("load", "", *shown)
    for one in found:
        table.add_row(one["load"], one["contender"], *(f"{one[name]:.4g}" for name in shown))
    Console(width=140).print(table)
    if out is not None:
        out.write_text(json.dumps({"threads": threads, "extra_ms": extra_ms, "runs": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
