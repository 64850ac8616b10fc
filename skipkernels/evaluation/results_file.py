"""ResultsFile: an evaluation as JSON, rewritten after every cell, so that the same command can resume.

settings    settings of all cells; those of each task under "tasks"
environment machine, versions, commit and date of the last run
memory      parameters that methods have found
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
        """Creates a file, or resumes one.

        Raises:
            RequestError: the file exists and ``resume`` is not set; or it is not a results file, or has other
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
                raise RequestError(f"{path}: exists already; give --resume to continue it, or another name")
            before = read_document(path, "results file", FORMAT, (VERSION,), RequestError)
            _check_settings(path, before["settings"], settings)
            self.document["memory"], self.document["cells"] = before["memory"], before["cells"]
            settings["tasks"] = before["settings"]["tasks"] | settings["tasks"]
        self.save()

    @property
    def cells(self) -> list[Cell]:
        cells: list[Cell] = self.document["cells"]
        return cells

    def cell(self, method: str, ratio: float, task: str) -> Cell | None:
        """The cell, if it is finished."""
        key = (method, ratio, task)
        return next((cell for cell in self.cells if (cell["method"], cell["ratio"], cell["task"]) == key), None)

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        self.save()

    def save(self) -> None:
        """Writes a new file and renames it over the old one, so that readers never see a partial file."""
        if self._path is None:
            return
        beside = self._path.with_name(self._path.name + ".writing")
        beside.write_text(_text(self.document), encoding="utf-8")
        beside.replace(self._path)


def _text(document: dict[str, Any]) -> str:
    """JSON with one line per cell, so that a diff shows which cells differ."""
    parts = [f"{json.dumps(name)}: {_line(value)}" for name, value in document.items() if name != "cells"]
    cells = ",\n".join(map(_line, document["cells"]))
    return "{\n" + ",\n".join([*parts, f'"cells": [\n{cells}\n]']) + "\n}\n"


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _check_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises RequestError if settings differ; tasks may be added."""
    shared = before["tasks"].keys() & now["tasks"].keys()
    pairs = [(before, now), *((before["tasks"][name], now["tasks"][name]) for name in sorted(shared))]
    for old, new in pairs:
        for name in sorted(old.keys() | new.keys() - {"tasks"}):
            if name != "tasks" and old.get(name) != new.get(name):
                raise RequestError(
                    f"{path}: was made with {name} = {old.get(name)!r}, this command has {new.get(name)!r}; "
                    "give the same, or another file"
                )
