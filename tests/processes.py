"""Runs commands and scripts in processes that need not import torch and transformers first, which takes five seconds.

Each is forked from a server that has done nothing but import; every test process has a server of its own. A command
gets the environment variables that the test has when it starts it.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired


def run_command(words: Sequence[str], cwd: Path | None = None, timeout: float = 280) -> CompletedProcess[str]:
    """``skipkernels`` with ``words``."""
    return _run(_command, list(words), cwd or Path.cwd(), timeout)


def run_script(words: Sequence[str], cwd: Path | None = None, timeout: float = 280) -> CompletedProcess[str]:
    """Python with ``words``, the first of which is a script."""
    return _run(_script, list(words), cwd or Path.cwd(), timeout)


def _command(words: list[str]) -> None:
    from skipkernels.cli import main

    sys.argv = ["skipkernels", *words]
    main()


def _script(words: list[str]) -> None:
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")


def _run(work: Callable[[list[str]], None], words: list[str], cwd: Path, timeout: float) -> CompletedProcess[str]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(target=_begin, args=(work, words, cwd, dict(os.environ), files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired(words, timeout)
        stdout, stderr = (path.read_text(encoding="utf-8") for path in files)
    return CompletedProcess(words, process.exitcode, stdout, stderr)


def _begin(
    work: Callable[[list[str]], None], words: list[str], cwd: Path, environment: dict[str, str], files: list[Path]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name, path in zip((1, 2), ("stdout", "stderr"), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False))
    work(words)


def resident_bytes() -> int:
    """Of this process."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, "Linux tells it"
    return 1024 * int(found[1])
