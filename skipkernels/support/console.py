"""What commands print: results go to stdout, everything said about them to stderr."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from skipkernels.errors import RequestError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

debugging = False
"""Whether --debug was given."""

Report = Callable[[str, float], None]
"""Called as (what is being done, share that is done)."""


def print_json(document: dict[str, Any]) -> None:
    """The only thing on stdout under ``--json``. NaN, which JSON lacks, becomes null."""
    holds_all = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(_without_nan(document), ensure_ascii=not holds_all))


def show_what_the_terminal_can() -> None:
    """A character that stdout's encoding lacks is shown as a question mark; it must not end a command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def stage(text: str) -> Iterator[None]:
    """What is being done, on stderr, gone when it is done; where that is no terminal, a line that stays."""
    if err.is_terminal:
        with err.status(text):
            yield
        return
    err.print(text, soft_wrap=True, markup=False)
    yield


@contextmanager
def progress_bar(label: str) -> Iterator[Report]:
    """A bar on stderr, gone when it is done; where that is no terminal, a line for each new stage."""
    if not err.is_terminal:
        seen: set[str] = set()

        def report(stage: str, share: float) -> None:
            if stage not in seen:
                seen.add(stage)
                err.print(f"{label}: {stage} ({share:.0%})")

        yield report
        return
    columns = (BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(label, total=1.0)
        yield lambda stage, share: progress.update(task, description=stage, completed=share)


def require_folder(*paths: Path | None) -> None:
    """Refuses, before the work, a file that could not be written after it."""
    for path in paths:
        if path is None:
            continue
        if not path.parent.is_dir():
            raise RequestError(f"{path}: cannot be written (there is no folder {path.parent})")
        if path.is_dir():
            raise RequestError(f"{path}: cannot be written (it is a folder)")
        if path.is_file() or not path.exists():
            _open_for_writing(path)


def _open_for_writing(path: Path) -> None:
    """Permissions, quotas and read-only file systems show only when a file is opened. It is left as it was."""
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise RequestError(f"{path}: cannot be written ({error.strerror})") from error
    if not existed:
        path.unlink()


def require_picture(*paths: Path | None) -> None:
    """Refuses, before the work, a picture that could not be drawn after it: no folder, or no matplotlib."""
    require_folder(*paths)
    if any(path is not None for path in paths):
        from skipkernels.support.pictures import pyplot

        pyplot()


def table(*headings: str, title: str | None = None) -> Table:
    """A table without vertical lines; every column but the first is aligned to the right."""
    made = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for number, heading in enumerate(headings):
        made.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return made


def count(number: int, noun: str) -> str:
    """``count(1, "token")`` is "1 token", ``count(2, "token")`` "2 tokens"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def percent(share: float) -> str:
    return f"{share:.1%}"
