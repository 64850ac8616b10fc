"""HarnessTask: a task of lm-evaluation-harness as a ``Task``, with intervals over its documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.engine import Engine
from skipkernels.errors import RequestError, SkipkernelsError
from skipkernels.evaluation.estimate import Item, Metric, Unit
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Method, OnItem, ignore

PREFIX = "lm-eval:"
_UNITS: dict[str, Unit] = {
    "mean": "number",
    "perplexity": "perplexity",
    "weighted_perplexity": "perplexity",
    "bits_per_byte": "number",
}
"""Unit of each aggregation function of the harness."""


class HarnessTask:
    """A task by name; ``include`` is a folder with further tasks, as YAML.

    Metrics that are not a mean over documents, such as corpus BLEU, have no interval and are left out.
    """

    total = 1

    def __init__(
        self,
        engine: Engine,
        task: str,
        alike: Sequence[Passage],
        *,
        include: Path | None = None,
        limit: int | None = None,
        decoded_context: int | None = None,
        seed: int = 0,
    ) -> None:
        self._engine = engine
        self._manager, self._task = _load(task, include)
        self._limit = limit
        self._decoded_context = decoded_context
        self._seed = seed
        self.name = PREFIX + task
        self.alike = alike
        means = {name: function.__name__ for name, function in self._task.aggregation().items()}
        self._means = {name: kind for name, kind in means.items() if kind in _UNITS}
        higher = self._task.higher_is_better()
        self.metrics = tuple(
            Metric(name, _UNITS[kind], bool(higher[name]), exponential=_UNITS[kind] == "perplexity")
            for name, kind in self._means.items()
        )
        if not self.metrics:
            raise RequestError(f"the task {task!r} has no metric that is a mean over its documents")

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "version": self._task.VERSION,
            "limit": self._limit,
            "decoded_context": self._decoded_context,
        }

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        from skipkernels.integrations.lm_eval import MethodLM, simple_evaluate

        lm = MethodLM(self._engine, method, decoded_context=self._decoded_context)
        results = simple_evaluate(
            model=lm,
            tasks=[self._task],
            task_manager=self._manager,
            limit=self._limit,
            bootstrap_iters=0,  # intervals are computed by this package
            random_seed=self._seed,
            numpy_random_seed=self._seed,
            torch_random_seed=self._seed,
            fewshot_random_seed=self._seed,
        )
        (samples,) = results["samples"].values()
        first = samples[0]["filter"]  # the harness may filter answers in several ways; the first is taken
        chosen = [sample for sample in samples if sample["filter"] == first]
        on_item(1)
        items = {name: [_item(kind, sample[name]) for sample in chosen] for name, kind in self._means.items()}
        return Outcome(items, lm.work)


def _load(name: str, include: Path | None) -> tuple[Any, Any]:
    """The harness's task index and a task of it, with its documents loaded.

    Raises:
        RequestError: there is no such task, or it is a group of several.
        SkipkernelsError: lm-eval is not installed, or the documents cannot be loaded.
    """

    manager = _manager(include, with_its_own=False) if include else None
    if manager is None or name not in manager.all_subtasks:
        manager = _manager(include, with_its_own=True)
    if name not in manager.all_subtasks:
        if name in manager.all_tasks:
            raise RequestError(f"{name!r} is a group of the harness's tasks; name the tasks one by one")
        place = f", nor has {include}" if include else "; --lm-eval-include names a folder with your own"
        raise RequestError(f"lm-evaluation-harness has no task {name!r}{place}")
    try:
        (task,) = manager.load(name)["tasks"].values()
    except Exception as error:  # loading data sets raises many types
        raise SkipkernelsError(f"the task {name!r} cannot be loaded ({type(error).__name__}: {error})") from error
    return manager, task


@cache
def _manager(include: Path | None, with_its_own: bool) -> Any:
    """The harness's task index. Reading its built-in tasks takes a minute, so they are read only if needed."""
    from skipkernels.integrations.lm_eval import TaskManager

    return TaskManager(include_path=None if include is None else str(include), include_defaults=with_its_own)


def _item(kind: str, value: Any) -> Item:
    """A document's contribution to a metric; log-likelihoods come with their count of words or bytes."""
    if kind == "mean":
        return float(value), 1.0
    if kind == "perplexity":
        return -float(value), 1.0
    log_likelihood, count = value
    nats = -float(log_likelihood)
    return (nats / math.log(2) if kind == "bits_per_byte" else nats), float(count)
