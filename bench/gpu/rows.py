"""Rows of a suite's run, each in the file as soon as it stands: what comes after it may hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Rows:
    def __init__(self, path: Path, **always: Any) -> None:
        self._path = path
        self._always = always

    def write(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as out:  # closed each time: on disk whatever becomes of this process
            out.write(json.dumps({**self._always, **row}) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows; a line that was cut off is a row that says so."""
    rows = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append({"unreadable": line[:200]})
    return rows
