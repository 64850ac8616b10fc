"""The options of ``skipkernels eval`` that say what is measured, and the tasks made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipkernels.cli import options as opt
from skipkernels.cli.models import ModelOptions, calibration_texts
from skipkernels.errors import RequestError

if TYPE_CHECKING:
    from skipkernels.demo import Fact
    from skipkernels.engine import Engine
    from skipkernels.passages import Passage
    from skipkernels.quality.setup import Setup
    from skipkernels.quality.task import Task

TASKS = ("facts", "perplexity", "generation", "summarization", "chat")
_PANEL = "What is measured"


@dataclass(frozen=True)
class TaskOptions:
    """Tasks and their files."""

    tasks: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(TASKS)}; with commas between. Default: those with a file, perplexity and generation; "
            "with --lm-eval none.",
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
    summaries: Annotated[Path | None, typer.Option(help="JSONL of article and summary.", rich_help_panel=_PANEL)] = None
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
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, with commas between.", rich_help_panel=_PANEL)
    ] = None
    lm_eval_include: Annotated[
        Path | None, typer.Option(help="Folder with YAML tasks of your own.", rich_help_panel=_PANEL)
    ] = None
    lm_eval_context: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Last tokens of a scored context that are decoded, not prefilled; default: all.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    limit: Annotated[
        int | None, typer.Option(min=1, help="Facts, articles, questions, documents at most.", rich_help_panel=_PANEL)
    ] = None
    passages: Annotated[int, typer.Option(min=2, help="Passages to find methods on and to measure on, half each.")] = 32
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Prompt of each passage.")] = 32
    new_tokens: Annotated[int, typer.Option(min=2, help="Decoded tokens of each passage.")] = 128
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest summary or turn of a chat.")] = 128

    def __post_init__(self) -> None:
        if (self.judge_url is None) != (self.judge_model is None):
            raise typer.BadParameter("--judge-url and --judge-model go together")
        unknown = [name for name in self._named() if name not in TASKS]
        if unknown:
            raise typer.BadParameter(f"unknown task {unknown[0]!r}; known are {', '.join(TASKS)}")

    def prepare(
        self, engine: Engine, model_options: ModelOptions, *, warmup_tokens: int, seed: int
    ) -> tuple[Setup, list[Task]]:
        """Text to find methods on, and the tasks.

        Raises:
            RequestError, SkipkernelsError: a file, a package or a task is missing or wrong; nothing was measured.
        """
        from skipkernels.passages import cut_passages
        from skipkernels.quality.facts import read_facts, split
        from skipkernels.quality.setup import Setup

        source, texts = calibration_texts(engine, model_options.model, self.text)
        prose = texts[:1]  # of the bundled model's text, facts are the second part
        beside = Path(model_options.path) / "facts.jsonl"
        facts_file = self.facts or (beside if beside.exists() else None)
        asked, others = split(read_facts(facts_file), self.limit, seed) if facts_file else ([], [])
        setup = Setup(
            engine,
            [*prose, *_as_text(engine, others)],
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            passages=self.passages,
            warmup_tokens=warmup_tokens,
            seed=seed,
        )
        search, held_out = cut_passages(engine, prose, self.passages, self.prompt_tokens, self.new_tokens)
        names = self._named() or self._default_tasks(facts_file)
        made = [self._task(name, setup, search, held_out, asked, others, source) for name in names]
        return setup, [*made, *self._harness_tasks(setup, search)]

    def _named(self) -> list[str]:
        return list(dict.fromkeys(self.tasks.split(","))) if self.tasks else []

    def _default_tasks(self, facts_file: Path | None) -> list[str]:
        if self.lm_eval is not None:
            return []
        with_a_file = {"facts": facts_file, "summarization": self.summaries, "chat": self.questions}
        return [name for name in TASKS if with_a_file.get(name, True)]

    def _task(
        self,
        name: str,
        setup: Setup,
        search: Sequence[Passage],
        held_out: Sequence[Passage],
        asked: Sequence[Fact],
        others: Sequence[Fact],
        source: str,
    ) -> Task:
        from skipkernels.quality.chat import Chat
        from skipkernels.quality.facts import Facts
        from skipkernels.quality.ffn_methods import Full
        from skipkernels.quality.free_generation import FreeGeneration
        from skipkernels.quality.judge import Judge
        from skipkernels.quality.perplexity import Perplexity
        from skipkernels.quality.summarization import Summarization

        engine = setup.engine
        if name == "facts":
            if not asked:
                raise RequestError("the task 'facts' needs a file; --facts names one (JSONL of question and answer)")
            return Facts(engine, asked, others)
        if name == "perplexity":
            return Perplexity(held_out, search, source)
        if name == "generation":
            full = Full()
            return FreeGeneration(held_out, search, full.build(setup, full.find(setup, 0.0, search)), source)
        if name == "summarization":
            if self.summaries is None:
                raise RequestError(
                    "the task 'summarization' needs a file; --summaries names one (JSONL of article and summary)"
                )
            return Summarization(engine, self.summaries, search, limit=self.limit, max_new_tokens=self.answer_tokens)
        if self.questions is None:
            raise RequestError("the task 'chat' needs a file; --questions names one (MT-Bench's question.jsonl)")
        judge = None
        if self.judge_url and self.judge_model:
            judge = Judge(self.judge_url, self.judge_model, self.judge_timeout)
        return Chat(
            engine,
            self.questions,
            self.answers,
            search,
            judge=judge,
            limit=self.limit,
            max_new_tokens=self.answer_tokens,
        )

    def _harness_tasks(self, setup: Setup, search: Sequence[Passage]) -> list[Task]:
        if self.lm_eval is None:
            return []
        from skipkernels.quality.harness import HarnessTask

        return [
            HarnessTask(
                setup.engine,
                name,
                search,
                include=self.lm_eval_include,
                limit=self.limit,
                decoded_context=self.lm_eval_context,
                seed=setup.seed,
            )
            for name in dict.fromkeys(self.lm_eval.split(","))
        ]


def _as_text(engine: Engine, facts: Sequence[Fact]) -> list[Sequence[int]]:
    """Facts with their answers as one text to find methods on, put together as the bundled model was trained."""
    if not facts or engine.tokenizer is None:
        return []
    from skipkernels.demo.batches import fact_tokens

    answered = (fact_tokens(engine.tokenizer, fact) for fact in facts)
    return [list(chain.from_iterable(chain.from_iterable(answered)))]
