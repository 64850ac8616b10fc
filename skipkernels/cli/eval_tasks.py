"""The options of ``skipkernels eval`` that say what is measured, and the tasks made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipkernels.cli import options as opt
from skipkernels.cli.models import ModelOptions, calibration_texts
from skipkernels.errors import RequestError

if TYPE_CHECKING:
    from skipkernels.calibration.passages import Passage
    from skipkernels.demo import Fact
    from skipkernels.engine import Engine
    from skipkernels.evaluation.full_text import FullText
    from skipkernels.evaluation.task import Task
    from skipkernels.methods.engine_method import EngineMethod
    from skipkernels.methods.setup import Setup

TASKS = (
    "facts",
    "factoids",
    "choices",
    "perplexity",
    "agreement",
    "generation",
    "summarization",
    "chat",
    "speed",
)
_PANEL = "What is measured"
_TIMED = 8  # prompts whose decoding is timed


@dataclass(frozen=True)
class TaskOptions:
    """Tasks and their files."""

    tasks: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(TASKS)}; separated by commas. Default: all whose files are there; with --lm-eval none.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    text: opt.Text = None
    facts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of question and answer; default: facts.jsonl in the model's folder.", rich_help_panel=_PANEL
        ),
    ] = None
    factoids: Annotated[
        Path | None,
        typer.Option(help="Questions of common knowledge, 'question | answer' a line.", rich_help_panel=_PANEL),
    ] = None
    choices: Annotated[
        Path | None,
        typer.Option(help="PIQA's questions, JSONL; the labels in NAME-labels.lst beside it.", rich_help_panel=_PANEL),
    ] = None
    summaries: Annotated[
        Path | None,
        typer.Option(help="JSONL of article and summary, or Spec-Bench's questions.", rich_help_panel=_PANEL),
    ] = None
    questions: Annotated[
        Path | None, typer.Option(help="MT-Bench's question.jsonl, for chat.", rich_help_panel=_PANEL)
    ] = None
    answers: Annotated[
        Path, typer.Option(help="Folder for the answers of chat, in MT-Bench's format.", rich_help_panel=_PANEL)
    ] = Path("mt_bench")
    judge_url: Annotated[
        str | None,
        typer.Option(help="OpenAI-compatible endpoint that grades chat, up to /v1.", rich_help_panel=_PANEL),
    ] = None
    judge_model: Annotated[
        str | None, typer.Option(help="The grading model; its key is in OPENAI_API_KEY.", rich_help_panel=_PANEL)
    ] = None
    judge_timeout: Annotated[float, typer.Option(help="Seconds for one grade.", rich_help_panel=_PANEL)] = 120.0
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.", rich_help_panel=_PANEL)
    ] = None
    lm_eval_include: Annotated[
        Path | None, typer.Option(help="Folder with YAML tasks of your own.", rich_help_panel=_PANEL)
    ] = None
    lm_eval_context: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="How many of the last tokens of a scored context are decoded, not prefilled; default: all.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of facts, articles, questions or documents.", rich_help_panel=_PANEL),
    ] = None
    passages: Annotated[
        int, typer.Option(min=2, help="Number of passages: half to tune methods on, half to measure on.")
    ] = 32
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt of each passage.")] = 32
    new_tokens: Annotated[int, typer.Option(min=2, help="Decoded tokens of each passage.")] = 128
    answer_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of a summary or a chat turn.")] = 128

    def __post_init__(self) -> None:
        if (self.judge_url is None) != (self.judge_model is None):
            raise typer.BadParameter("--judge-url and --judge-model go together")
        unknown = [name for name in self._named() if name not in TASKS]
        if unknown:
            raise typer.BadParameter(f"unknown task {unknown[0]!r}; known are {', '.join(TASKS)}")

    def prepare(
        self, engine: Engine, model_options: ModelOptions, *, warmup_tokens: int, seed: int
    ) -> tuple[Setup, list[Task]]:
        """The setup with the text to tune methods on, and the tasks.

        Raises:
            RequestError, SkipkernelsError: a file, a package or a task is missing or wrong; nothing was measured.
        """
        from skipkernels.calibration.passages import cut_passages
        from skipkernels.evaluation.asking import split
        from skipkernels.evaluation.facts import read_facts
        from skipkernels.methods.setup import Setup

        # not the second part of the bundled model's text: it has facts that would be asked later
        (prose, *_) = calibration_texts(engine, model_options.model, self.text)[1]
        beside = Path(model_options.path) / "facts.jsonl"
        facts_file = self.facts or (beside if beside.exists() else None)
        asked, others = split(read_facts(facts_file), self.limit, seed) if facts_file else ([], [])
        setup = Setup(
            engine,
            [prose, *_as_text(engine, others)],
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            passages=self.passages,
            warmup_tokens=warmup_tokens,
            seed=seed,
        )
        search, held_out = cut_passages(engine, [prose], self.passages, self.prompt_tokens, self.new_tokens)
        material = _Material(setup, search, held_out, asked, others, model_options)
        names = self._named() or self._default_tasks(facts_file)
        made = {name: getattr(self, f"_{name}") for name in TASKS}
        return setup, [*(made[name](material) for name in names), *self._harness_tasks(material)]

    def _named(self) -> list[str]:
        return list(dict.fromkeys(self.tasks.split(","))) if self.tasks else []

    def _default_tasks(self, facts_file: Path | None) -> list[str]:
        if self.lm_eval is not None:
            return []
        needed = {
            "facts": facts_file,
            "factoids": self.factoids,
            "choices": self.choices,
            "summarization": self.summaries,
            "chat": self.questions,
            "speed": False,  # takes the machine for itself, so it has to be asked for
        }
        return [name for name in TASKS if needed.get(name, True)]

    def _facts(self, material: _Material) -> Task:
        from skipkernels.evaluation.facts import Facts

        if not material.asked:
            raise RequestError("the task 'facts' needs a file; --facts names one (JSONL of question and answer)")
        return Facts(material.setup.engine, material.asked, material.others)

    def _factoids(self, material: _Material) -> Task:
        from skipkernels.evaluation.asking import split
        from skipkernels.evaluation.factoids import Factoids, read_factoids

        if self.factoids is None:
            raise RequestError("the task 'factoids' needs a file; --factoids names one ('question | answer' a line)")
        drawn = split(read_factoids(self.factoids), self.limit, material.setup.seed, Factoids.name)
        return Factoids(material.setup.engine, *drawn)

    def _choices(self, material: _Material) -> Task:
        from skipkernels.evaluation.asking import split
        from skipkernels.evaluation.choices import Choices, read_choices

        if self.choices is None:
            raise RequestError("the task 'choices' needs a file; --choices names one (PIQA's questions)")
        drawn = split(read_choices(self.choices), self.limit, material.setup.seed, Choices.name)
        return Choices(material.setup.engine, *drawn)

    def _speed(self, material: _Material) -> Task:
        from skipkernels.evaluation.decode_speed import DecodeSpeed

        return DecodeSpeed(material.held_out[:_TIMED], material.search, material.dense_alone)

    def _perplexity(self, material: _Material) -> Task:
        from skipkernels.evaluation.perplexity import Perplexity

        source = "the standard library's documentation" if self.text is None else ", ".join(map(str, self.text))
        return Perplexity(material.held_out, material.search, source, material.full)

    def _agreement(self, material: _Material) -> Task:
        from skipkernels.evaluation.agreement import Agreement

        return Agreement(*material.full_texts)

    def _generation(self, material: _Material) -> Task:
        from skipkernels.evaluation.free_generation import FreeGeneration

        return FreeGeneration(*material.full_texts)

    def _summarization(self, material: _Material) -> Task:
        from skipkernels.evaluation.summarization import Summarization

        if self.summaries is None:
            raise RequestError(
                "the task 'summarization' needs a file; --summaries names one (JSONL of article and summary)"
            )
        return Summarization(
            material.setup.engine,
            self.summaries,
            material.search,
            limit=self.limit,
            max_new_tokens=self.answer_tokens,
        )

    def _chat(self, material: _Material) -> Task:
        from skipkernels.evaluation.chat import Chat
        from skipkernels.evaluation.judge import Judge

        if self.questions is None:
            raise RequestError("the task 'chat' needs a file; --questions names one (MT-Bench's question.jsonl)")
        judge = None
        if self.judge_url and self.judge_model:
            judge = Judge(self.judge_url, self.judge_model, self.judge_timeout)
        return Chat(
            material.setup.engine,
            self.questions,
            self.answers,
            material.search,
            judge=judge,
            full=material.full,
            limit=self.limit,
            max_new_tokens=self.answer_tokens,
        )

    def _harness_tasks(self, material: _Material) -> list[Task]:
        if self.lm_eval is None:
            return []
        from skipkernels.evaluation.harness import HarnessTask

        return [
            HarnessTask(
                material.setup.engine,
                name,
                material.search,
                include=self.lm_eval_include,
                limit=self.limit,
                decoded_context=self.lm_eval_context,
                seed=material.setup.seed,
            )
            for name in dict.fromkeys(self.lm_eval.split(","))
        ]


@dataclass
class _Material:
    """Inputs of the tasks."""

    setup: Setup
    search: Sequence[Passage]
    held_out: Sequence[Passage]
    asked: Sequence[Fact]
    others: Sequence[Fact]
    model_options: ModelOptions

    @cached_property
    def full(self) -> EngineMethod:
        from skipkernels.methods.ffn_methods import Full

        return Full().build(self.setup, Full().find(self.setup, 0.0, ()))

    @cached_property
    def dense_alone(self) -> EngineMethod:
        """The full model as one would run it without skipping: down_proj does not lie for single neurons, which costs
        a dense step some per cent. Its weights are loaded a second time for that."""
        from skipkernels.methods.engine_method import EngineMethod
        from skipkernels.skipping.policy import DensePolicy

        if not self.setup.engine.weights.neuron_rows:
            return self.full
        return EngineMethod(self.model_options.load(), lambda batch: DensePolicy())

    @cached_property
    def full_texts(self) -> tuple[FullText, FullText]:
        """Texts generated by the full model: to measure on, and to set ratios on."""
        from skipkernels.evaluation.full_text import FullText

        return FullText(self.held_out, self.full), FullText(self.search, self.full)


def _as_text(engine: Engine, facts: Sequence[Fact]) -> list[Sequence[int]]:
    """Facts with their answers as one text to tune methods on, arranged as in the bundled model's training."""
    if not facts or engine.tokenizer is None:
        return []
    from skipkernels.demo.batches import fact_tokens

    answered = (fact_tokens(engine.tokenizer, fact) for fact in facts)
    return [list(chain.from_iterable(chain.from_iterable(answered)))]
