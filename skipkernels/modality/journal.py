"""A log of a long measurement, so that a killed one can resume where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skipkernels.modality.errors import ProfileError


class Journal:
    """Entries in memory and, with a path, in a file of JSON lines. The first line says what they belong to.

    An incomplete last line, left by a killed process, is dropped.

    Args:
        header: identifies the measurement; a file with another header is refused.

    Raises:
        ProfileError: the file belongs to something else, or cannot be read.
    """

    def __init__(self, path: str | Path | None, header: dict[str, Any]) -> None:
        self.entries: list[dict[str, Any]] = []
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        found: list[dict[str, Any]] = []
        if self._path.exists():
            found = self._read(self._path)
        if found and found[0] != header:
            differing = sorted(name for name in header if header[name] != found[0].get(name))
            raise ProfileError(
                f"{self._path}: holds another measurement (it differs in {', '.join(differing) or 'its fields'}); "
                "delete it to start over"
            )
        self.entries = found[1:]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in [header, *self.entries]))

    def add(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Deletes the file; for a measurement that is complete."""
        if self._path is not None:
            self._path.unlink()

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = []
        text = path.read_text().splitlines()
        for number, line in enumerate(text, 1):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(text):
                    break
                raise ProfileError(f"{path}, line {number}: is not JSON ({error}); delete the file") from error
        return lines
