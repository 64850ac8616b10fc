"""What a bench leaves behind: where it ran, and its rows as JSON."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import skipkernels
from skipkernels import _C
from skipkernels.machine import processor_name


def environment() -> dict[str, Any]:
    """Device, versions, commit and date of a measurement."""
    packages = ("torch", "transformers", "numpy")
    return {
        "device": processor_name(),
        "isa": _C.usable_isas()[0],
        "versions": {
            "skipkernels": skipkernels.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str:
    """The commit of the source tree this package runs from, with ``+`` when it was changed; ``unknown`` elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "csrc", "skipkernels"], cwd=root, capture_output=True, text=True
    )
    return (head.stdout.strip() or "unknown") + ("+" if dirty.stdout.strip() else "")


def write_json(path: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
    path.write_text(json.dumps({"settings": settings, "rows": list(rows)}, indent=2) + "\n")
