"""``skipkernels eval``: what skipping costs, on every method, ratio and task, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipkernels.cli import eval_suite as suites
from skipkernels.cli.eval_suite import SuiteOptions
from skipkernels.cli.eval_tasks import TaskOptions
from skipkernels.cli.groups import grouped
from skipkernels.cli.models import ModelOptions
from skipkernels.support.console import err, out, print_json, progress_bar, require_folder, require_picture, table

if TYPE_CHECKING:
    from skipkernels.engine import Engine
    from skipkernels.evaluation.evaluation import Entry
    from skipkernels.evaluation.task import Task
    from skipkernels.methods.setup import Setup
    from skipkernels.skipping.policy import Policy

_ROWS = 16
_PROMPT_POSITIONS = 1 << 17  # of the cache, so that prompts stay: Spec-Bench's 80 articles take 63,000
_STDOUT = Path("-")
_RATIOS = "0.1,0.2,0.25,0.35"


@dataclass(frozen=True)
class MethodOptions:
    """The methods, and the ratios to measure them at."""

    methods: Annotated[
        str | None,
        typer.Option(
            help="full, neuron, skip, mixed, held, cats, teal, random, fixed, skipdecode, shortgpt, exit; with commas. "
            f"Default: all but held; of a suite {suites.METHODS}.",
        ),
    ] = None
    ratios: Annotated[
        str | None,
        typer.Option(
            help="Shares of FFN bytes, or of layers, to leave out. Default: 0.1,0.2,0.25,0.35; of a suite "
            f"{suites.RATIOS}."
        ),
    ] = None
    policy: Annotated[
        Path | None,
        typer.Option(
            help="A file of `skipkernels calibrate`, or the name of a policy that comes with the package; for the "
            "method of its kind, in place of --ratios."
        ),
    ] = None
    warmup_tokens: Annotated[
        int, typer.Option(min=1, help="First generated tokens, which skip nothing; few, because answers may be short.")
    ] = 1

    def of_suite(self, suite: SuiteOptions) -> MethodOptions:
        """With the suite's methods and ratio where none are given."""
        if suite.suite is None:
            return self
        methods = suites.QUICK_METHODS if suite.quick else suites.METHODS
        return replace(self, methods=self.methods or methods, ratios=self.ratios or suites.RATIOS)

    def ratio_list(self) -> list[float]:
        try:
            ratios = [float(part) for part in (self.ratios or _RATIOS).split(",")]
        except ValueError as error:
            raise typer.BadParameter(f"--ratios takes numbers separated by commas, got {self.ratios!r}") from error
        wrong = [ratio for ratio in ratios if not 0.0 < ratio < 1.0]
        if wrong:
            raise typer.BadParameter(f"a ratio must lie between 0 and 1, got {wrong[0]:g}")
        return ratios

    def given_policy(self, engine: Engine | None = None) -> Policy:
        """That of the file; with ``engine``, only one that fits its model.

        Raises:
            PolicyError, BadParameter: it does not fit, or none of the methods is of its kind.
        """
        from skipkernels.methods.ffn_skip import grain
        from skipkernels.skipping.policy_file import load_policy

        assert self.policy is not None
        policy = load_policy(self.policy, fingerprint=engine.fingerprint if engine else None)
        if self.methods is not None and grain(policy) not in self.methods.split(","):
            raise typer.BadParameter(
                f"{self.policy} holds a policy of the method {grain(policy)!r}, which --methods {self.methods} lacks"
            )
        if engine is not None:
            policy.plan(engine.config.num_hidden_layers)
        return policy

    def digest(self) -> str | None:
        """What tells one policy file from another."""
        from skipkernels.evaluation.jsonl import digest
        from skipkernels.skipping.policy_file import read_policy_file

        return None if self.policy is None else digest(str(read_policy_file(self.policy)))

    def entries(self, setup: Setup, policy: Policy | None) -> list[Entry]:
        """Methods and ratios; the full model first, because others are compared with it. ``policy``: of the file."""
        from skipkernels.evaluation.evaluation import Entry
        from skipkernels.methods.ffn_skip import GivenPolicy
        from skipkernels.methods.method import FULL
        from skipkernels.methods.methods import DEFAULT_METHODS, method_kind

        given = None if policy is None else GivenPolicy(policy, setup.warmup_tokens)
        ratios = self.ratio_list()
        names = dict.fromkeys(self.methods.split(",")) if self.methods else DEFAULT_METHODS
        kinds = [method_kind(name) for name in names]
        entries = []
        for kind in sorted(kinds, key=lambda kind: kind.name != FULL):
            if kind.name == FULL:
                entries.append(Entry(kind, [0.0]))
            elif given is not None and kind.name == given.name:
                entries.append(Entry(given, [given.ratio(setup)]))
            else:
                entries.append(Entry(kind, ratios))
        return entries


@grouped
def evaluate(
    model_options: ModelOptions,
    method_options: MethodOptions,
    task_options: TaskOptions,
    suite_options: SuiteOptions,
    seed: Annotated[int, typer.Option(help="Seed of the choice of facts, random skips and resamples.")] = 0,
    json: Annotated[
        Path | None,
        typer.Option(help="Results file, written after every cell; '-' prints it at the end, and nothing else."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the --json file of the same command.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture: quality over skip ratio, with intervals.")] = None,
) -> None:
    """Measure what leaving out work costs: facts, perplexity, generation and more, on every method at every ratio.

    A ratio is the share of FFN bytes for methods that leave out neurons or FFNs, and the share of layers for methods
    that skip layers. Tables show the share of FFN bytes and of all layers' bytes that were not read. Run it once per
    model.
    """
    task_options, missing = suite_options.applied(task_options)
    method_options = method_options.of_suite(suite_options)
    if missing:
        err.print(f"left out, as their files are not in {suite_options.data}: {', '.join(missing)}")
    method_options.ratio_list()  # raises for a wrong command line before a model is loaded
    if method_options.policy is not None:
        method_options.given_policy()
    if resume and json is None:
        raise typer.BadParameter("--resume continues the file of --json; give both")
    require_folder(None if json == _STDOUT else json)
    require_picture(plot)
    engine = _with_room_for_prompts(model_options.load(neuron_rows=model_options.device == "cpu"))
    policy = method_options.given_policy(engine) if method_options.policy is not None else None

    from skipkernels.evaluation.evaluation import evaluate as fill_cells
    from skipkernels.evaluation.results_file import ResultsFile
    from skipkernels.support.report import environment

    with err.status("collecting text and tasks ..."):
        setup, tasks = task_options.prepare(
            engine, model_options, warmup_tokens=method_options.warmup_tokens, seed=seed
        )
        entries = method_options.entries(setup, policy)
    results = ResultsFile(
        None if json == _STDOUT else json,
        settings=_settings(engine, setup, task_options, tasks, method_options),
        environment=environment(engine.execution),
        resume=resume,
    )
    with progress_bar("measuring") as report:
        try:
            unfinished = fill_cells(setup, entries, tasks, results, report)
        except KeyboardInterrupt:
            if json is not None and json != _STDOUT:
                err.print(f"{json} holds what is finished; the same command with --resume goes on")
            raise
    if plot is not None:
        from skipkernels.evaluation.plot import plot_quality

        panels = [(task.name, metric) for task in tasks for metric in task.metrics]
        plot_quality(results.cells, panels, plot, f"{model_options.model}, {engine.dtype}")
    if json == _STDOUT:
        print_json(results.document)
    else:
        _print_tables(results.cells, tasks, method_options.warmup_tokens)
        written = [str(path) for path in (json, plot) if path is not None]
        if written:
            out.print(f"wrote {' and '.join(written)}")
    if unfinished:
        raise unfinished[0]


def _with_room_for_prompts(loaded: Engine) -> Engine:
    """With ``_ROWS`` rows, and a cache in which the prompts of a task last from one method to the next: nearly all
    methods compute prompts in full, so the first one does it for all."""
    from skipkernels.decoding.cache_size import CACHE_SHARE
    from skipkernels.support.memory import free_memory_bytes

    positions = max(_ROWS * loaded.max_seq_len, _PROMPT_POSITIONS)
    wanted = loaded.config.cache_bytes(1, positions, loaded.weights.dtype)
    free = free_memory_bytes(str(loaded.execution.device))
    return loaded.with_rows(_ROWS, min(wanted, int(CACHE_SHARE * free)))


def _settings(
    engine: Engine, setup: Setup, task_options: TaskOptions, tasks: Sequence[Task], method_options: MethodOptions
) -> dict[str, Any]:
    from skipkernels.evaluation.jsonl import digest

    return {
        "fingerprint": engine.fingerprint,
        "dtype": engine.dtype,
        "device": str(engine.execution.device),
        "calibration_text": digest(str([list(text) for text in setup.texts])),
        "prompt_tokens": setup.prompt_tokens,
        "new_tokens": setup.new_tokens,
        "passages": setup.passages,
        "warmup_tokens": setup.warmup_tokens,
        "policy": method_options.digest(),
        "seed": setup.seed,
        "tasks": {task.name: task.settings for task in tasks},
    }


def _print_tables(cells: list[dict[str, Any]], tasks: Sequence[Task], warmup_tokens: int) -> None:
    from skipkernels.evaluation.report import group_table, tables, unreachable

    for task in tasks:
        details = (f"{name.replace('_', ' ')} {value}" for name, value in task.settings.items() if name != "digest")
        title: str | None = f"{task.name}: {', '.join(details)}"
        for headings, rows in tables(cells, task.name, task.metrics):
            _print_table(title, headings, rows)
            title = None
        if by_kind := group_table(cells, task.name, task.metrics[0]):
            _print_table(by_kind[0], *by_kind[1])
    out.print(
        f"[dim]FFN: share of its bytes not read. Bytes: of all the layers' weights. Both per generated token, "
        f"of which the first {warmup_tokens} of every answer run in full. In brackets: 95 %, bootstrap over items.[/]"
    )
    for line in unreachable(cells):
        err.print(f"[yellow]not measured:[/] {line}", markup=True)


def _print_table(title: str | None, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    shown = table(*headings, title=title)
    shown.padding = (0, 1, 0, 0)  # 80 columns
    for row in rows:
        shown.add_row(*row)
    out.print(shown)
