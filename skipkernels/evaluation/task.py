"""Task: measures any method, item by item."""

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
    """The result of one method on all items of a task."""

    items: dict[str, list[Item]]
    """By the name of the metric, one entry per item of the task."""
    work: Work
    groups: list[str] | None = None
    """The group of each item, for tasks with groups."""


class Task(Protocol):
    """A set of items, and how a method is measured on them."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[Metric, ...]: ...

    @property
    def alike(self) -> Sequence[Passage]:
        """Passages that resemble the measured ones, without being among them: on these, methods reach their ratio."""
        ...

    @property
    def total(self) -> int:
        """The sum of all ``on_item`` counts in a run."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that results depend on, besides model and method; plain JSON. Only equal settings compare."""
        ...

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        """Measures ``method``; ``label`` is its name in files that the task writes."""
        ...


class Unfinished(SkipkernelsError, RuntimeError):
    """A task was interrupted by an external cause. Finished work is kept, and the same command resumes it."""
