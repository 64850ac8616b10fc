"""ResultsFile: an evaluation as JSON, written anew after every cell, from which the same command goes on.

settings    what all cells depend on; those of each task under "tasks"
environment machine, versions, commit and date of the last run
memory      what methods found
cells       one method at one ratio on one task
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skipkernels.errors import RequestError
from skipkernels.support.files import read_document

FORMAT = "skipkernels.quality"
VERSION = 1

Cell = dict[str, Any]


class ResultsFile:
    """The document, kept in ``path``; None keeps it in memory only."""

    def __init__(
        self, path: Path | None, *, settings: dict[str, Any], environment: dict[str, Any], resume: bool = False
    ) -> None:
        """Begins a file, or goes on with one.

        Raises:
            RequestError: the file is there and ``resume`` is not set; or it is no results file, or one of other
                settings.
        """
        self._path = path
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "settings": settings,
            "environment": environment,
            "memory": {},
            "cells": [],
        }
        if path is not None and path.exists():
            if not resume:
                raise RequestError(f"{path}: is there already; --resume goes on with it, another name begins anew")
            before = read_document(path, "results file", FORMAT, VERSION, RequestError)
            _check_settings(path, before["settings"], settings)
            self.document["memory"], self.document["cells"] = before["memory"], before["cells"]
            settings["tasks"] = before["settings"]["tasks"] | settings["tasks"]
        self.save()

    @property
    def cells(self) -> list[Cell]:
        cells: list[Cell] = self.document["cells"]
        return cells

    def cell(self, method: str, ratio: float, task: str) -> Cell | None:
        """The finished cell, if it is."""
        key = (method, ratio, task)
        return next((cell for cell in self.cells if (cell["method"], cell["ratio"], cell["task"]) == key), None)

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        self.save()

    def save(self) -> None:
        """Writes the whole file beside the old one and puts it in its place: a reader never sees a half of it."""
        if self._path is None:
            return
        beside = self._path.with_name(self._path.name + ".writing")
        beside.write_text(_text(self.document), encoding="utf-8")
        beside.replace(self._path)


def _text(document: dict[str, Any]) -> str:
    """JSON with a line for each cell: a difference between two files shows which cells it is in."""
    parts = [f"{json.dumps(name)}: {_line(value)}" for name, value in document.items() if name != "cells"]
    cells = ",\n".join(map(_line, document["cells"]))
    return "{\n" + ",\n".join([*parts, f'"cells": [\n{cells}\n]']) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _check_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """A task may be new; what is in both must be the same."""
    shared = before["tasks"].keys() & now["tasks"].keys()
    pairs = [(before, now), *((before["tasks"][name], now["tasks"][name]) for name in sorted(shared))]
    for old, new in pairs:
        for name in sorted(old.keys() | new.keys() - {"tasks"}):
            if name != "tasks" and old.get(name) != new.get(name):
                raise RequestError(
                    f"{path}: was made with {name} = {old.get(name)!r}, this command says {new.get(name)!r}; "
                    "give the same, or another file"
                )
