"""``skipkernels calibrate``: finds the skip policy for a wanted ratio and writes it to a file."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipkernels.cli import options as opt
from skipkernels.cli.groups import grouped
from skipkernels.cli.models import (
    CALIBRATION_ROWS,
    POLICY_FILE,
    ModelOptions,
    calibration_texts,
    parse_span,
    run_calibration,
)
from skipkernels.support.console import err, out, percent, print_json, require_folder, require_picture, table

if TYPE_CHECKING:
    from skipkernels.calibration.calibration import Calibration
    from skipkernels.calibration.scoring import Comparison
    from skipkernels.calibration.verification import Margin

_SHOWN_TRIALS = 8


@grouped
def calibrate(
    model_options: ModelOptions,
    skip_ratio: Annotated[float, typer.Option(help="Wanted ratio of skipped FFN executions.")] = 0.25,
    text: opt.Text = None,
    out_file: Annotated[Path, typer.Option("--out", help="The policy file to write.")] = Path(POLICY_FILE),
    plot: Annotated[Path | None, typer.Option(help="Draw the similarity of every layer to this PNG.")] = None,
    json: opt.Json = False,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Length of generations for which the ratio should hold.")
    ] = 128,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt before each of them.")] = 32,
    passages: Annotated[
        int, typer.Option(min=2, help="Number of passages: half to search on, half to verify on.")
    ] = 32,
    span: opt.Span = None,
    first_dense_layers: opt.FirstDenseLayers = None,
    last_dense_layers: opt.LastDenseLayers = None,
    warmup_tokens: opt.WarmupTokens = None,
    batch_rule: opt.BatchRule = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Find a threshold for each layer; takes up to twice as long.")
    ] = False,
) -> None:
    """Find threshold, span, dense layers and warm-up for a wanted skip ratio, and write them to a policy file.

    Parameters that are not given are searched for. The figures are measured on held-out text, which the search has not
    seen, beside a fixed and a random choice of FFNs.
    """
    require_folder(out_file)
    require_picture(plot)
    given: dict[str, Any] = {
        "first_dense_layers": first_dense_layers,
        "last_dense_layers": last_dense_layers,
        "warmup_tokens": warmup_tokens,
        "batch_rule": batch_rule,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if span is not None:
        given["spans"] = (parse_span(span),)
    rows = min(CALIBRATION_ROWS, -(-passages // 2))
    engine = model_options.load(max_batch_size=rows)
    source, texts = calibration_texts(engine, model_options.model, text)
    started = time.perf_counter()
    calibration = run_calibration(
        engine,
        texts,
        skip_ratio,
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        passages=passages,
        per_layer=per_layer,
        **given,
    )
    seconds = time.perf_counter() - started
    calibration.save(out_file)
    if plot is not None:
        from skipkernels.calibration.plots import plot_similarity

        plot_similarity(calibration.curve, calibration.policy, plot)
    if json:
        print_json(_document(calibration, source, out_file, seconds))
    else:
        _print_result(calibration, source, seconds)
        out.print(f"wrote {out_file}" + (f" and {plot}" if plot else ""))


def _print_result(calibration: Calibration, source: str, seconds: float) -> None:
    trials = table("search, the best first", "warm-up", "skipped", "KL")
    for trial in calibration.trials[:_SHOWN_TRIALS]:
        skipped = percent(trial.comparison.skip_ratio)
        trials.add_row(trial.policy.label, str(trial.policy.warmup_tokens), skipped, f"{trial.kl:.4f}")
    err.print(trials)

    policy, held_out = calibration.policy, calibration.held_out
    rows = table("on held-out text", "skipped", "top-1", "KL", "perplexity", title=policy.label)
    rows.add_row("dense", percent(0.0), percent(1.0), "0", f"{held_out.dense_perplexity:.3f}")
    rows.add_row("calibrated", *_cells(held_out), style="bold")
    for baseline in calibration.baselines:
        rows.add_row(baseline.policy.label, *_cells(baseline.comparison))
    out.print(rows)
    for margin in calibration.margins:
        out.print(margin_sentence(margin, held_out.skip_ratio))
    out.print(
        f"[dim]Holds for {calibration.new_tokens} generated tokens, the first {policy.warmup_tokens} of them warm-up; "
        "top-1 agreement with dense and KL from it, in nats, are those past the warm-up, but differences and the "
        f"search count all tokens. Text: {source}, {held_out.tokens} held-out tokens; {seconds:.0f} s.[/]"
    )
    if not calibration.reached:
        reached = calibration.trials[0].comparison.skip_ratio
        err.print(
            f"[yellow]warning:[/] the search reached {reached:.1%} instead of {calibration.wanted_ratio:.1%}: "
            "the similarities are too close together for a threshold between them"
        )


def margin_sentence(margin: Margin, ratio: float) -> str:
    """Whether the policy, which skips ``ratio``, is better than a baseline, and by how much."""
    baseline = {"fixed": "a fixed choice of layers", "random": "a random choice"}[margin.against]
    at = percent(ratio)
    if percent(margin.skip_ratio) != at:
        at += f" against {percent(margin.skip_ratio)}"
    interval = (margin.low, margin.high) if margin.kl >= 0 else (-margin.high, -margin.low)
    return (
        f"At {at} skipped the policy [bold]{margin.verdict}[/] {baseline}: its KL from dense is {abs(margin.kl):.4f} "
        f"nats {'lower' if margin.kl >= 0 else 'higher'} (95 % interval {interval[0]:.4f} to {interval[1]:.4f})."
    )


def _cells(comparison: Comparison) -> tuple[str, ...]:
    return (
        percent(comparison.skip_ratio),
        percent(comparison.top1_agreement),
        f"{comparison.kl:.4f}",
        f"{comparison.perplexity:.3f}",
    )


def _document(calibration: Calibration, source: str, file: Path, seconds: float) -> dict[str, Any]:
    return {
        "policy_file": str(file),
        "policy": calibration.policy.to_dict(),
        "reached": calibration.reached,
        "measured": calibration.measured(),
        "trials": [
            {"policy": t.policy.to_dict(), "kl_of_all_tokens": t.kl, "measured": asdict(t.comparison)}
            for t in calibration.trials
        ],
        "text": source,
        "seconds": seconds,
    }
