"""``skipkernels bench serving``: selection policies beside each other, simulated and on a real server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipkernels.cli.bench.options import DeviceOptions
from skipkernels.cli.bench.serving_load import LoadOptions
from skipkernels.cli.bench.serving_workload import ModelOptions
from skipkernels.cli.groups import grouped
from skipkernels.support.console import out, percent, print_json, progress_bar, require_folder, require_picture, table

if TYPE_CHECKING:
    from skipkernels.benchmark.serving.bench import Comparison
    from skipkernels.modality.metrics import Summary


@grouped
def serving(
    device_options: DeviceOptions,
    model_options: ModelOptions,
    load_options: LoadOptions,
    simulated: Annotated[bool, typer.Option("--simulated", help="Simulate only, without a real server.")] = False,
    json: Annotated[
        Path | None, typer.Option(help="Write rows and settings to this file; '-' prints them, and nothing else.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture: throughput and accuracy of each contender.")] = None,
    frontier: Annotated[Path | None, typer.Option(help="Picture: accuracy over time of every strategy.")] = None,
) -> None:
    """Compare policies that choose modalities and skip levels for jobs with deadlines, on the same arrivals."""
    require_folder(json)
    require_picture(plot, frontier)
    from skipkernels.benchmark.serving.bench import decision_rows, run_comparison
    from skipkernels.benchmark.serving.plots import plot_comparison, plot_frontier
    from skipkernels.benchmark.serving.server_run import EmbeddedServer
    from skipkernels.support.report import environment, write_json

    execution = device_options.execution()
    process, slacks = load_options.arrivals(), load_options.slacks
    server: EmbeddedServer | None = None
    if model_options.workload == "fusion":
        model, profile = model_options.fusion(execution)
        if not simulated:
            server = EmbeddedServer(model, model_options.held_out())
    else:
        profile = model_options.fixed_profile()
    contenders = load_options.contenders(profile)
    comparisons = []
    with progress_bar("serving") as report:
        for number, slack in enumerate(slacks):
            comparison = run_comparison(
                contenders,
                load_options.workload(slack),
                overload_per_s=load_options.overload_per_s(profile),
                max_violations=load_options.max_violations,
                process=process,
                simulated_jobs=load_options.simulated_jobs,
                jobs=load_options.jobs,
                overload_jobs=load_options.overload_jobs,
                rounds=load_options.rounds,
                seed=load_options.seed,
                server=server,
                progress=lambda stage, share: report(stage, (number + share) / len(slacks)),  # noqa: B023
            )
            comparisons.append(comparison)
    facts = environment(execution)
    decisions = decision_rows(profile, load_options.policies.split(","))
    rows = [{**row, **facts} for comparison in comparisons for row in comparison.rows()]
    settings = {
        "model": profile.model,
        "profile_source": profile.source,
        "threads": device_options.num_threads,
        **asdict(load_options),
        "overload_per_s": load_options.overload_per_s(profile),
        "overhead_ms": [comparison.overhead_ms for comparison in comparisons],
        "strategies": [
            {
                "strategy": entry.strategy.name,
                "accuracy": entry.accuracy,
                "promised_accuracy": entry.promised_accuracy,
                "median_ms": {timing.batch_size: timing.median_ms for timing in entry.timings},
                "p95_ms": {timing.batch_size: timing.p95_ms for timing in entry.timings},
            }
            for entry in profile.strategies
        ],
        "decisions": decisions,
    }
    how = "simulated" if server is None else "real server"
    title = f"{profile.model}, {how}, {load_options.process}, {facts['device']}, {facts['date']}"
    if json is not None and str(json) != "-":
        write_json(json, rows, settings)
    if plot is not None:
        plot_comparison(comparisons[0].results, plot, f"{title}, slack {slacks[0]}")
    if frontier is not None:
        plot_frontier(profile, frontier)
    if str(json) == "-":
        print_json({"settings": settings, "rows": rows})
        return
    for comparison in comparisons:
        _print_comparison(comparison, title, load_options.max_violations)
    slowest = max(decisions, key=lambda row: row["decision_ms"])
    out.print(
        f"deciding for {slowest['requests']} waiting requests: at most {slowest['decision_ms']:.2f} ms in the median "
        f"({slowest['policy']}; p95 {slowest['decision_ms_p95']:.2f} ms)"
    )


def _print_comparison(comparison: Comparison, title: str, max_violations: float) -> None:
    from skipkernels.benchmark.serving.bench import skip_ratio

    results = comparison.results
    required = results[0].overload.required_accuracy
    out.print(f"[bold]{title}[/bold]\nslack {comparison.workload.slack}: jobs require an accuracy of {required:.4f}\n")
    skipped = [[skip_ratio(run) for run in runs] for runs in (comparison.capacity, comparison.overload)]
    _print_load(
        f"at the highest rate with at most {percent(max_violations)} of the jobs late",
        {result.contender: result.capacity for result in results},
        skipped[0],
        lambda summary, full: summary.throughput_per_s / full.throughput_per_s,
    )
    _print_load(
        f"overloaded with {results[0].overload.offered_per_s:.0f} requests/s",
        {result.contender: result.overload for result in results},
        skipped[1],
        lambda summary, full: full.completion_mean_ms / summary.completion_mean_ms,
    )
    out.print("x full: requests/s over full's, and under overload how many times shorter the mean completion is")
    out.print("mean, p99: completion of a job in ms; promise, achieved: accuracy; skip: of the FFNs of decoded labels")
    if any(name == "skipping only" for name in (result.contender for result in results)):
        out.print("modalities only, skipping only: maximize with one dimension of the strategies")
    if comparison.capacity:
        _print_deviations(comparison)


def _print_load(
    title: str,
    summaries: dict[str, Summary],
    skipped: list[float],
    ratio: Callable[[Summary, Summary], float],
) -> None:
    shown = table("", "req/s", "x full", "late", "mean", "p99", "promise", "achieved", "skip", title=title)
    shown.padding = (0, 1, 0, 0)  # 80 columns
    full = summaries.get("full")
    for number, (name, summary) in enumerate(summaries.items()):
        achieved = summary.achieved_accuracy
        shown.add_row(
            name,
            f"{summary.throughput_per_s:.1f}",
            f"{ratio(summary, full):.2f}" if full else "",
            percent(summary.violation_ratio),
            f"{summary.completion_mean_ms:,.0f}",
            f"{summary.completion_p99_ms:,.0f}",
            f"{summary.promised_accuracy:.4f}",
            "" if achieved is None else f"{achieved:.4f}",
            percent(skipped[number]) if skipped else "",
        )
    out.print(shown)


def _print_deviations(comparison: Comparison) -> None:
    for load, runs in (("at its rate", comparison.capacity), ("overloaded", comparison.overload)):
        title = f"{load}: real over simulated, less 1; of the last two the difference in points"
        shown = table("", "req/s", "mean", "p99", "late", "promise", title=title)
        for run in runs:
            off = run.deviations
            shown.add_row(
                run.contender.name,
                *(f"{off[name]:+.1%}" for name in ("throughput_per_s", "completion_mean_ms", "completion_p99_ms")),
                *(f"{100 * off[name]:+.1f}" for name in ("violation_ratio", "promised_accuracy")),
            )
        out.print(shown)
