"""What a bench leaves behind: where it ran, and its rows as JSON."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from skipkernels import _C, __version__
from skipkernels.support.machine import processor_name


class Execution(Protocol):
    """What is reported of an ``executors.execution.Execution``, resolved."""

    @property
    def on_gpu(self) -> bool: ...
    @property
    def device(self) -> str: ...
    @property
    def kernels(self) -> str: ...
    @property
    def conditional(self) -> str: ...
    @property
    def loop(self) -> str: ...


def environment(execution: Execution) -> dict[str, Any]:
    """Device, versions, commit and date of a measurement."""
    packages = ("torch", "transformers", "numpy")
    return {
        **(_gpu(execution) if execution.on_gpu else {"device": processor_name(), "isa": _C.usable_isas()[0]}),
        "versions": {
            "skipkernels": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _gpu(execution: Execution) -> dict[str, Any]:
    import torch

    index = torch.device(execution.device).index
    device = _C.cuda_device(torch.cuda.current_device() if index is None else index) if _C.cuda_built else {}
    return {
        "device": torch.cuda.get_device_name(execution.device),
        "peak_gb_per_s": device.get("peak_gb_per_s"),
        "driver": _C.cuda_status()["driver_version"] if _C.cuda_built else "unknown",
        "cuda": torch.version.cuda,
        "triton": metadata.version("triton") if execution.kernels == "triton" else None,
        "kernels": execution.kernels,
        "conditional": execution.conditional,
        "loop": execution.loop,
    }


def with_peak_floor(row: dict[str, Any]) -> dict[str, Any]:
    """``row``, and beside the floor at the bandwidth probed that at the memory's peak, where it is known."""
    peak = row.get("peak_gb_per_s")
    if not peak or "bytes_per_token" not in row:
        return row
    return {**row, "peak_floor_ms": row["bytes_per_token"] / peak / 1e6}


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
