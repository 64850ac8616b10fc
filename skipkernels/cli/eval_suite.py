"""``skipkernels eval --suite paper``: the paper's kinds of tasks on a folder of public files, in one command."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from skipkernels.cli.eval_tasks import TaskOptions
from skipkernels.errors import RequestError

FILES = {
    "factoids": "freebaseqa-eval.txt",
    "choices": "piqa-valid.jsonl",
    "summaries": "spec_bench-question.jsonl",
    "questions": "mt_bench-question.jsonl",
    "text": "wikitext2-first-half.raw",
}
"""The option of each task, and the name of its file in the folder."""
_TASKS = {"factoids": "factoids", "choices": "choices", "summaries": "summarization", "questions": "chat"}
_ALWAYS = ("perplexity", "agreement", "speed")
_SIZES = {"limit": 200}
_QUICK_SIZES = {"limit": 24, "passages": 12, "new_tokens": 64, "answer_tokens": 48}
METHODS = "full,neuron,mixed,skip,fixed,random,shortgpt"
QUICK_METHODS = "full,neuron,skip,fixed"
RATIOS = "0.24"
_PANEL = "Suite"


@dataclass(frozen=True)
class SuiteOptions:
    """A set of tasks by name, and the folder with their files."""

    suite: Annotated[
        str | None,
        typer.Option(
            help="paper: factoids, choices, summaries, chat, perplexity, agreement and speed, on the files of --data.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(
            help=f"Folder of --suite with any of {', '.join(FILES.values())}; what is missing is left out and named.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help="A few items of each task of --suite.", rich_help_panel=_PANEL)
    ] = False

    def __post_init__(self) -> None:
        if self.suite not in (None, "paper"):
            raise typer.BadParameter(f"unknown suite {self.suite!r}; known is paper")
        if (self.suite is None) != (self.data is None):
            raise typer.BadParameter("--suite and --data go together")
        if self.quick and self.suite is None:
            raise typer.BadParameter("--quick is for --suite")

    def applied(self, tasks: TaskOptions) -> tuple[TaskOptions, list[str]]:
        """The tasks with the folder's files, and the names of the files that are missing. What was given stays.

        Raises:
            RequestError: there is no such folder, or none of the files in it.
        """
        if self.data is None:
            return tasks, []
        if not self.data.is_dir():
            raise RequestError(f"{self.data}: is no folder; --data names the one with {', '.join(FILES.values())}")
        found = {option: path for option, name in FILES.items() if (path := self.data / name).exists()}
        if not found:
            raise RequestError(f"{self.data}: holds none of {', '.join(FILES.values())}")
        sizes = _QUICK_SIZES if self.quick else _SIZES
        defaults = TaskOptions()
        changed: dict[str, Any] = {
            name: value for name, value in sizes.items() if getattr(tasks, name) == getattr(defaults, name)
        }
        for option, path in found.items():
            if getattr(tasks, option) is None:
                changed[option] = [path] if option == "text" else path
        if tasks.tasks is None:
            changed["tasks"] = ",".join([*(_TASKS[option] for option in _TASKS if option in found), *_ALWAYS])
        return replace(tasks, **changed), [FILES[option] for option in FILES if option not in found]
