"""Files of one JSON object per line, with errors that name the line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipkernels.errors import RequestError
from skipkernels.support.files import read_text


def read_jsonl(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a file. Empty lines are skipped.

    Args:
        fields: names and types that each object must have; other fields are kept.

    Raises:
        RequestError: the file cannot be read or is empty; or a line is not a JSON object, or lacks a field, or has
            one of another type. The message names the line.
    """
    objects = [
        _parse(f"{path}, line {number}", line, fields)
        for number, line in enumerate(read_text(path).split("\n"), start=1)
        if line.strip()
    ]
    if not objects:
        raise RequestError(f"{path}: is empty; expected one JSON object per line with {_names(fields)}")
    return objects


def digest(text: str) -> str:
    """Twelve hex digits that change when the text does."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _parse(where: str, line: str, fields: Mapping[str, type]) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"{where}: is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(value, dict):
        raise RequestError(f"{where}: expected an object with {_names(fields)}, got {type(value).__name__}")
    for name, kind in fields.items():
        if name not in value:
            raise RequestError(f"{where}: the field {name!r} is missing; expected {_names(fields)}")
        if not isinstance(value[name], kind):
            raise RequestError(
                f"{where}: the field {name!r} must be {_TYPES[kind]}, got {_TYPES.get(type(value[name]), 'null')}"
            )
    return value


_TYPES = {str: "a text", list: "a list", int: "a whole number", float: "a number", dict: "an object", bool: "a boolean"}


def _names(fields: Mapping[str, type]) -> str:
    return ", ".join(repr(name) for name in fields)
