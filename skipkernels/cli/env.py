"""``skipkernels env``: what was built, what can be used here, and why the rest cannot."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from skipkernels import __version__
from skipkernels.cli import options as opt
from skipkernels.support.console import out, print_json
from skipkernels.support.machine import default_threads, processor_name, usable_processors

_EXTRAS = {"triton": ("triton",), "plot": ("matplotlib",), "bench": ("gguf",), "test": ("pytest", "hypothesis")}
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def env(json: opt.Json = False) -> None:
    """Show what was built, what can be used on this machine, and why the rest cannot."""
    sections = {
        "skipkernels": _package(),
        "machine": _machine(),
        "gpu": _gpu(),
        "libraries": _libraries(),
        "extras": _extras(),
    }
    if json:
        print_json(sections)
        return
    for title, entries in sections.items():
        rows = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        rows.add_column(style="dim", width=22, no_wrap=True)
        rows.add_column(overflow="fold")
        for name, value in entries.items():
            rows.add_row(f"  {name}", escape(_shown(value)))
        out.print(f"[bold]{title}[/]")
        out.print(rows)


def _package() -> dict[str, Any]:
    from skipkernels.demo import demo_model_path

    entries: dict[str, Any] = {"version": __version__, "location": str(Path(__file__).parents[1])}
    try:
        from skipkernels import _C
    except ImportError as error:
        return entries | {"executors": ["reference"], "extension": f"not usable: {error}"}
    has_demo = (demo_model_path() / "config.json").exists()
    return entries | {
        "executors": ["cpu", "graph", "reference"],
        "extension": str(_C.__file__),
        "instruction sets": list(_C.usable_isas()),
        "demo model": "present" if has_demo else "missing: train it with python -m skipkernels.demo.train",
    }


def _machine() -> dict[str, Any]:
    import torch

    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "processors usable": usable_processors(),
        "threads by default": default_threads(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "huge pages": _huge_pages(),
        "torch threads": torch.get_num_threads(),
    }


def _huge_pages() -> str:
    """The kernel's mode: weights ask for 2 MB pages, and get them in modes 'always' and 'madvise'."""
    try:
        modes = _HUGE_PAGES.read_text()
    except OSError:
        return "unknown: the kernel does not say"
    mode = modes.partition("[")[2].partition("]")[0]
    return f"{mode}: weights stay on 4 KB pages" if mode == "never" else f"{mode}: weights get 2 MB pages"


def _gpu() -> dict[str, Any]:
    """Each part of the GPU runtime: usable, or why not."""
    import torch

    try:
        from skipkernels import _C
        from skipkernels.executors.support import CudaSupport
    except ImportError as error:
        return {"device cuda": f"not usable: {error}"}
    support = CudaSupport.probe()
    parts = {
        "device cuda": support.device,
        **{f"kernels {name}": missing for name, missing in support.kernels.items()},
        "conditional if_node": support.if_node,
        "loop while": support.while_node,
    }
    entries = {name: f"not usable: {missing}" if missing else "usable" for name, missing in parts.items()}
    if support.device is None:
        entries["device cuda"] = f"usable: {torch.cuda.get_device_name()}"
    return entries | {"cuda part": f"{'built' if _C.cuda_built else 'not built'}: {_C.build_note}"}


def _libraries() -> dict[str, Any]:
    return {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES}


def _extras() -> dict[str, Any]:
    entries = {}
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            entries[extra] = f"missing: pip install skipkernels[{extra}]"
        else:
            entries[extra] = ", ".join(f"{package} {_version(package)}" for package in packages)
    return entries


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
