"""Files that people hand in: read whole, with errors that say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skipkernels.errors import RequestError, SkipkernelsError


def read_text(path: str | Path, refuse: type[SkipkernelsError] = RequestError) -> str:
    """Raises ``refuse`` where there is no UTF-8 text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise refuse(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise refuse(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_document(
    path: str | Path, what: str, file_format: str, versions: tuple[int, ...], refuse: type[SkipkernelsError]
) -> dict[str, Any]:
    """A JSON object that names its format and one of ``versions``; ``what`` it should be stands in the errors.

    Raises:
        SkipkernelsError: as ``refuse``: unreadable, no JSON, another format or version.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise refuse(f"{path}: cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise refuse(f"{path}: is not JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != file_format:
        raise refuse(f"{path}: is not a {what} (its format is not {file_format!r})")
    if document.get("version") not in versions:
        known = " and ".join(map(str, versions))
        raise refuse(f"{path}: has version {document.get('version')}, this release reads version {known}")
    return document
