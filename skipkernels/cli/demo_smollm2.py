"""``skipkernels demo --model smollm2``: a model that others trained answers questions, dense beside skipping."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding

from skipkernels.cli.demo import NO_FASTER
from skipkernels.cli.models import SMOLLM2, ModelOptions, calibration_texts, run_calibration
from skipkernels.skipping.policy import DensePolicy, Policy
from skipkernels.support.console import percent, print_json, progress_bar, table

if TYPE_CHECKING:
    from skipkernels.calibration.calibration import Calibration
    from skipkernels.decoding.generation import Generation
    from skipkernels.engine import Engine

_QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a short poem about the sea.",
)
_ANSWER_TOKENS = 80
_SAVING = 0.25  # KL about 0.05 on text
_ROWS = 8
_SPEED_TOKENS, _SPEED_ROUNDS = 96, 3


def demo_smollm2(json: bool, threads: int | None) -> None:
    options = ModelOptions(SMOLLM2, dtype="bf16", threads=threads, max_seq_len=1024)
    engine = options.load(neuron_rows=True)
    screen = Console(highlight=False, quiet=json)
    screen.print(
        f"SmolLM2-135M-Instruct, {engine.config.num_hidden_layers} layers in {engine.dtype}. Per token, neurons of its "
        "FFNs that matter little are left out, and their weights are not read. First a calibration for this model "
        f"({percent(_SAVING)} of the FFN bytes), then answers.\n"
    )
    source, texts = calibration_texts(engine, SMOLLM2, None)
    calibration = run_calibration(
        engine.with_rows(_ROWS), texts, _SAVING, kinds=("neurons",), passages=2 * _ROWS, timed=False, text_label=source
    )
    pairs = [_ask(screen, engine, question, calibration.policy) for question in _QUESTIONS]
    figures = _speeds(engine, calibration.policy)
    if json:
        answers = [
            {"question": question, "dense": dense.text, "skipping": skipping.text, "unread": skipping.unread_ratio}
            for question, (dense, skipping) in zip(_QUESTIONS, pairs, strict=True)
        ]
        print_json({"answers": answers, "held_out": asdict(calibration.held_out), "tokens_per_s": figures})
    else:
        _print_figures(screen, calibration, figures, pairs)


def _ask(screen: Console, engine: Engine, question: str, policy: Policy) -> tuple[Generation, Generation]:
    screen.print(f"[bold]{question}[/]")
    answers = []
    for name, chosen in (("dense", DensePolicy()), ("skipping", policy)):
        (answer,) = engine.generate(
            [[{"role": "user", "content": question}]], max_new_tokens=_ANSWER_TOKENS, policy=chosen
        )
        screen.print(f"  [dim]{name}, {percent(answer.unread_ratio)} of the FFN bytes not read[/]")
        screen.print(Padding(answer.text.strip(), (0, 0, 0, 4)), markup=False)
        answers.append(answer)
    screen.print()
    return answers[0], answers[1]


def _speeds(engine: Engine, policy: Policy) -> tuple[float, float]:
    from skipkernels.calibration.speed import measure_speeds

    with progress_bar("timing, dense and skipping in turns") as report:
        dense, skipping = measure_speeds(
            engine,
            engine.encode(_QUESTIONS[0]),
            (DensePolicy(), policy),
            new_tokens=_SPEED_TOKENS,
            rounds=_SPEED_ROUNDS,
            on_run=lambda share: report("timing", share),
        )
    return dense.tokens_per_s, skipping.tokens_per_s


def _print_figures(
    screen: Console,
    calibration: Calibration,
    speeds: tuple[float, float],
    pairs: list[tuple[Generation, Generation]],
) -> None:
    held_out, (dense, skipping) = calibration.held_out, speeds
    unread = sum(answer.unread_ratio for _, answer in pairs) / len(pairs)
    rows = table("", "dense", "skipping")
    rows.add_row("FFN bytes not read, answers above", percent(0.0), percent(unread))
    rows.add_row("tokens/s, one row, in turns", f"{dense:.0f}", f"{skipping:.0f} ({skipping / dense:.2f}x)")
    rows.add_row("same next token, new text", percent(1.0), percent(held_out.top1_agreement))
    rows.add_row("KL from dense, new text, nats", "0", f"{held_out.kl:.3f}")
    rows.add_row("perplexity, new text", f"{held_out.dense_perplexity:.2f}", f"{held_out.perplexity:.2f}")
    screen.print(rows)
    if skipping <= dense:
        screen.print(NO_FASTER)
    screen.print(f"[dim]New text: {held_out.tokens} tokens that the search has not seen, of {calibration.text}.[/]")
