"""``skipkernels calibrate``: finds the best policy for a wanted saving and writes it to a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from skipkernels.support.console import count, err, out, percent, print_json, require_folder, require_picture, table

if TYPE_CHECKING:
    from rich.table import Table

    from skipkernels.calibration.calibration import Calibration
    from skipkernels.calibration.speed import Gain
    from skipkernels.calibration.tuning import Trial
    from skipkernels.calibration.verification import Margin

_SHOWN_TRIALS = 12
_DEFAULT_RATIO = 0.25
_KINDS = {
    "neurons": "single neurons",
    "similarity": "blocks by similarity",
    "mixed": "neurons beside blocks (mixed)",
    "fixed": "a fixed choice of blocks",
    "random": "a random choice of blocks",
}


@grouped
def calibrate(
    model_options: ModelOptions,
    skip_ratio: Annotated[
        float | None, typer.Option(help="Wanted share of the FFN bytes not read; default: 0.25.")
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(help="Instead: the largest divergence, in nats; saves as much as it can."),
    ] = None,
    warn_kl: Annotated[
        float, typer.Option(help="Warn where even the best policy costs more nats, and name the largest saving below.")
    ] = 0.1,
    kinds: Annotated[
        str, typer.Option(help="What to try, separated by commas; fixed and random do not look at the token.")
    ] = ",".join(_KINDS),
    text: opt.Text = None,
    out_file: Annotated[Path, typer.Option("--out", help="The policy file to write.")] = Path(POLICY_FILE),
    plot: Annotated[
        Path | None, typer.Option(help="Draw what each kind costs, and every layer's similarity, to this PNG.")
    ] = None,
    json: opt.Json = False,
    new_tokens: Annotated[
        int, typer.Option(min=2, help="Length of generations for which the saving should hold.")
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
) -> None:
    """Find the policy that leaves a wanted share of the FFN bytes unread at the least cost, and write it to a file.

    Neurons, blocks by similarity, mixtures, and fixed and random blocks are tuned to the same saving; the one closest
    to the dense model on held-out text, which the search has not seen, is written.
    """
    if skip_ratio is not None and max_kl is not None:
        raise typer.BadParameter("--skip-ratio and --max-kl exclude each other")
    from skipkernels.calibration.calibration import check_wanted

    chosen = _kinds(kinds)
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
    wanted = _DEFAULT_RATIO if skip_ratio is None and max_kl is None else skip_ratio
    check_wanted(wanted, max_kl, warn_kl)  # before a model is loaded
    engine = model_options.load(max_batch_size=rows, neuron_rows=bool({"neurons", "mixed"} & {*chosen}))
    source, texts = calibration_texts(engine, model_options.model, text)
    started = time.perf_counter()
    calibration = run_calibration(
        engine,
        texts,
        wanted,
        max_kl=max_kl,
        warn_kl=warn_kl,
        kinds=chosen,
        text_label=source,
        new_tokens=new_tokens,
        prompt_tokens=prompt_tokens,
        passages=passages,
        **given,
    )
    seconds = time.perf_counter() - started
    if json:
        print_json(_document(calibration, out_file, seconds))
    else:
        _print_result(calibration, seconds)
    calibration.save(out_file)  # after the result, which is not lost where a disk is full
    if plot is not None:
        from skipkernels.calibration.plots import plot_calibration

        plot_calibration(calibration, plot)
    if not json:
        out.print(f"wrote {out_file}" + (f" and {plot}" if plot else ""))


def _kinds(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in _KINDS:
            raise typer.BadParameter(f"--kinds knows {', '.join(_KINDS)}; got {name!r}")
    return names


def _print_result(calibration: Calibration, seconds: float) -> None:
    err.print(_trial_table("search, the best first", calibration.trials[:_SHOWN_TRIALS]))
    best = calibration.best
    rows = _trial_table("on held-out text", calibration.verified)
    rows.add_row("dense", percent(0.0), percent(1.0), "0", f"{best.comparison.dense_perplexity:.3f}")
    out.print(rows)
    for margin in calibration.margins:
        out.print(margin_sentence(margin, best.comparison.skip_ratio))
    out.print(f"[bold]{_KINDS[best.kind].capitalize()}[/] won: {best.policy.label}.")
    if calibration.gain is not None:
        out.print(gain_sentence(calibration.gain))
    held_out = f"{count(best.comparison.tokens, 'token')} in {count(len(best.passage_kl), 'passage')}"
    out.print(
        f"[dim]Saved: share of FFN bytes not read, of {calibration.new_tokens} generated tokens, the first "
        f"{calibration.warmup_tokens} of them in full. Top-1 agreement with dense and KL from it, in nats: past those. "
        f"Text: {calibration.text}; held out: {held_out}; {seconds:.0f} s.[/]"
    )
    if calibration.gain is not None and not calibration.gain.faster:
        err.print(slower_warning(calibration))
    if not calibration.reached:
        reached = percent(best.comparison.skip_ratio)
        err.print(f"[yellow]warning:[/] {reached} is saved instead of {percent(calibration.wanted_ratio)}")
    if best.comparison.kl > calibration.warn_kl:
        below = (
            ""
            if calibration.affordable is None
            else f" The largest saving found below it is {percent(calibration.affordable)}, as neurons."
        )
        err.print(
            f"[yellow]warning:[/] even the best policy costs {best.comparison.kl:.3f} nats, more than "
            f"{calibration.warn_kl:g}: answers will differ from the model's own.{below}"
        )


def _trial_table(title: str, trials: Sequence[Trial]) -> Table:
    rows = table(title, "saved", "top-1", "KL", "perplexity")
    for number, trial in enumerate(trials):
        c = trial.comparison
        cells = percent(c.skip_ratio), percent(c.top1_agreement), f"{c.kl:.4f}", f"{c.perplexity:.3f}"
        rows.add_row(trial.kind, *cells, style="" if number else "bold")
    return rows


def margin_sentence(margin: Margin, ratio: float) -> str:
    """Whether the policy, which saves ``ratio``, is better than another kind, by how much, and on how much text."""
    from skipkernels.calibration.verification import FEWEST_PASSAGES

    at = percent(ratio)
    if percent(margin.skip_ratio) != at:
        at += f" against {percent(margin.skip_ratio)}"
    interval = (margin.low, margin.high) if margin.kl >= 0 else (-margin.high, -margin.low)
    few = margin.passages < FEWEST_PASSAGES
    spread = (
        f"{margin.passages} of the {FEWEST_PASSAGES} passages that an interval takes; --passages gives more"
        if few
        else f"95 % interval {interval[0]:.4f} to {interval[1]:.4f}, {margin.passages} passages, {margin.tokens} tokens"
    )
    return (
        f"At {at} saved the policy [bold]{margin.verdict}[/] {_KINDS[margin.against]}: its KL from dense is "
        f"{abs(margin.kl):.4f} nats {'lower' if margin.kl >= 0 else 'higher'} ({spread})."
    )


def gain_sentence(gain: Gain) -> str:
    return (
        f"Decoding one row, in turns with dense: {gain.ratio:.2f}x its speed, the median of {gain.rounds} rounds of "
        f"{gain.new_tokens} tokens ({gain.low:.2f} to {gain.high:.2f}). Over all rounds, the median of the policy is "
        f"{gain.tokens_per_s:.1f} tokens/s, of dense {gain.dense_tokens_per_s:.1f}."
    )


def slower_warning(calibration: Calibration) -> str:
    assert calibration.gain is not None
    line = (
        "[yellow]warning:[/] on this machine the policy is no faster than the dense model "
        f"({calibration.gain.ratio:.2f}x): it saves reading, not time. "
    )
    faster = calibration.faster
    if faster is None and len(calibration.verified) == 1:
        return line + "No other kind was tried: --kinds names more. Else decode with --dense."
    if faster is None:
        return line + "No other kind that was tried is faster at this saving; decode with --dense."
    gain = calibration.gains[faster.kind]
    return line + (
        f"The best that is faster is {_KINDS[faster.kind]}: {gain.ratio:.2f}x, KL {faster.comparison.kl:.3f}; "
        f"--kinds {faster.kind} writes it."
    )


def _document(calibration: Calibration, file: Path, seconds: float) -> dict[str, Any]:
    from skipkernels.calibration.calibration import without_scales

    return {
        "policy_file": str(file),
        "kind": calibration.best.kind,
        "policy": calibration.policy.to_dict(),
        "reached": calibration.reached,
        "measured": calibration.measured(),
        "trials": [
            {
                "kind": t.kind,
                "policy": without_scales(t.policy),
                "kl_of_all_tokens": t.kl,
                "measured": asdict(t.comparison),
            }
            for t in calibration.trials
        ],
        "text": calibration.text,
        "seconds": seconds,
        "faster": calibration.faster and calibration.faster.kind,
    }
