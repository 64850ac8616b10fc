"""CpuExecutor: hands the program to the native executor, which replays whole generations without the GIL."""

from __future__ import annotations

from collections.abc import Generator

from skipkernels import _C
from skipkernels.errors import DeviceError
from skipkernels.executors.formats import require_arranged_int8, require_formats
from skipkernels.executors.native import native_program
from skipkernels.model.matrix import FLOAT_FORMATS, GGUF_FORMATS
from skipkernels.program import Program
from skipkernels.program.state import DecodeState
from skipkernels.support.machine import default_threads


class CpuExecutor:
    """Executes a program in C++ on ``num_threads`` threads (default: every processor this process may use)."""

    name = "cpu"

    def __init__(
        self, program: Program, state: DecodeState, *, num_threads: int | None = None, isa: str = "auto"
    ) -> None:
        if state.active.device.type != "cpu":
            raise DeviceError(f"the cpu executor needs buffers on the cpu, got {state.active.device}")
        require_formats(program, "cpu", (*FLOAT_FORMATS, *GGUF_FORMATS))
        require_arranged_int8(program, "cpu")
        self.program = program  # keeps the tensors alive whose addresses the native program holds
        self.state = state
        try:
            self._native = _C.CpuExecutor(
                program=native_program(program, state),
                active=state.active.data_ptr(),
                num_rows=state.num_rows,
                num_threads=default_threads() if num_threads is None else num_threads,
                isa=isa,
            )
        except (ValueError, RuntimeError) as error:  # also: the system gives no more threads
            raise DeviceError(str(error)) from error
        self.num_threads: int = self._native.num_threads
        self.isa: str = self._native.isa

    def run(self, max_steps: int) -> list[float]:
        """Runs up to ``max_steps`` steps, until no row is active or ``interrupt`` was called. Returns each step's
        seconds."""
        return self._native.run(max_steps)

    def steps(self, max_steps: int) -> Generator[float]:
        """Runs up to ``max_steps`` steps, one at a time, until no row is active, and yields each step's seconds."""
        for _ in range(max_steps):
            yield from self.run(1)

    def interrupt(self) -> None:
        self._native.interrupt()

    def run_instruction(self, index: int) -> None:
        """Runs one instruction of the program, for tests that compare buffers after each."""
        self._native.run_instruction(index)

    def profile(self, steps: int) -> list[tuple[str, float]]:
        """Runs ``steps`` steps and returns (op, seconds in it) for every instruction of the program."""
        self._native.set_profiling(True)
        try:
            self._native.run(steps)
            return [(ins.op, seconds) for ins, seconds in zip(self.program, self._native.profile, strict=True)]
        finally:
            self._native.set_profiling(False)
