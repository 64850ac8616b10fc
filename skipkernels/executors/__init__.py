"""Executors of the decode program; ``get_executor`` is the one place that knows their names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Protocol

from skipkernels.errors import DeviceError
from skipkernels.program import Program
from skipkernels.state import DecodeState

logger = logging.getLogger(__name__)

EXECUTORS = ("auto", "cpu", "reference")


class Executor(Protocol):
    """Replays a program over the state it was recorded with."""

    name: str

    def run(self, max_steps: int) -> list[float]:
        """Runs up to ``max_steps`` steps, until no row is active. Returns each step's seconds."""
        ...

    def steps(self) -> Iterator[float]:
        """Runs until no row is active, and yields each step's seconds as it ends. The device may be some steps ahead
        of what was yielded; when the iterator is closed, it has come to rest."""
        ...

    def run_instruction(self, index: int) -> None: ...


def check_executor(name: str, num_threads: int | None) -> None:
    """Refuses what ``get_executor`` would refuse, before a model is loaded for it.

    Raises:
        DeviceError: unknown name, or no thread to run on.
    """
    if name not in EXECUTORS:
        raise DeviceError(f"unknown executor {name!r}; use one of {', '.join(EXECUTORS)}")
    if num_threads is not None and num_threads < 1:
        raise DeviceError(f"num_threads must be at least 1, got {num_threads}")


def get_executor(name: str, program: Program, state: DecodeState, *, num_threads: int | None = None) -> Executor:
    """Builds an executor by name; ``auto`` is resolved once, here, and logged.

    Raises:
        DeviceError: unknown name, or no thread to run on.
    """
    from skipkernels.executors.cpu import CpuExecutor
    from skipkernels.executors.reference import ReferenceExecutor

    check_executor(name, num_threads)
    if name == "reference":
        return ReferenceExecutor(program, state)
    executor = CpuExecutor(program, state, num_threads=num_threads)
    if name == "auto":
        logger.info("executor auto: cpu, %s, %d threads", executor.isa, executor.num_threads)
    return executor
