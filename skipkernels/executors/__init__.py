"""Executors of the decode program; ``get_executor`` is the one place that knows their names."""

from __future__ import annotations

import logging
from collections.abc import Generator
from typing import Protocol

from skipkernels.executors.execution import Execution
from skipkernels.program import Program
from skipkernels.program.state import DecodeState

logger = logging.getLogger(__name__)


class Executor(Protocol):
    """Replays a program over the state it was recorded with."""

    name: str
    program: Program

    def run(self, max_steps: int) -> list[float]:
        """Runs up to ``max_steps`` steps, until no row is active or ``interrupt`` was called. Returns each step's
        seconds."""
        ...

    def steps(self, max_steps: int) -> Generator[float]:
        """Runs up to ``max_steps`` steps, until no row is active, and yields each step's seconds as it ends. The device
        may be some steps ahead of what was yielded; when the iterator is closed, it has come to rest."""
        ...

    def interrupt(self) -> None:
        """Lets the ``run`` that goes on in another thread, or the next one, return after its current step."""
        ...

    def run_instruction(self, index: int) -> None: ...


class ProfilingExecutor(Executor, Protocol):
    """An executor with a clock of its own: all but the reference."""

    def profile(self, steps: int) -> list[tuple[str, float]]:
        """(op, seconds in ``steps`` steps) of every instruction."""
        ...


def get_executor(execution: Execution, program: Program, state: DecodeState) -> Executor:
    """Builds the executor of a resolved ``execution``.

    Raises:
        DeviceError: it cannot run this program.
    """
    if execution.executor == "reference":
        from skipkernels.executors.reference import ReferenceExecutor

        return ReferenceExecutor(program, state)
    if execution.executor == "graph":
        from skipkernels.executors.graph import GraphExecutor

        return GraphExecutor(program, state, execution)
    from skipkernels.executors.cpu import CpuExecutor

    executor = CpuExecutor(program, state, num_threads=execution.num_threads)
    logger.info("executor cpu: %s, %d threads", executor.isa, executor.num_threads)
    return executor
