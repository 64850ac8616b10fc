"""Task: something to measure, item by item, on any method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from skipkernels.calibration.passages import Passage
from skipkernels.errors import SkipkernelsError
from skipkernels.evaluation.estimate import Item, Metric
from skipkernels.methods.method import Method, OnItem, ignore
from skipkernels.methods.work import Work


@dataclass(frozen=True)
class Outcome:
    """What one method did on all items of a task."""

    items: dict[str, list[Item]]
    """By the name of the metric, one entry per item of the task."""
    work: Work
    groups: list[str] | None = None
    """The kind of each item, where a task has kinds."""


class Task(Protocol):
    """A set of items, and how a method is measured on them."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def alike(self) -> Sequence[Passage]:
        """Passages that resemble what is measured and are not: methods keep their ratio on them."""
        ...

    @property
    def total(self) -> int:
        """How many times ``on_item`` counts one in a run."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What results depend on, besides model and method; plain JSON. Results of other settings do not compare."""
        ...

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        """Measures ``method``, which files that a task writes call ``label``."""
        ...


class Unfinished(SkipkernelsError, RuntimeError):
    """A task could not be finished for a reason outside; what was done is kept, and the same command goes on."""
