"""ReferenceExecutor: replays the program op by op in PyTorch. Slow, and the definition of right."""

from __future__ import annotations

import time
from collections.abc import Generator

import torch

from skipkernels.program import Program
from skipkernels.program.reference import REFERENCE
from skipkernels.program.state import DecodeState


class ReferenceExecutor:
    """Executes a program by the functions of ``program.reference``."""

    name = "reference"

    def __init__(self, program: Program, state: DecodeState) -> None:
        self.program = program
        self.state = state
        self._interrupted = False

    @torch.inference_mode()
    def run(self, max_steps: int) -> list[float]:
        """Runs up to ``max_steps`` steps, until no row is active or ``interrupt`` was called. Returns each step's
        seconds."""
        seconds: list[float] = []
        while len(seconds) < max_steps and bool(self.state.active.any()) and not (seconds and self._interrupted):
            started = time.perf_counter()
            for index in range(len(self.program)):
                self.run_instruction(index)
            seconds.append(time.perf_counter() - started)
        self._interrupted = False  # not at the start: a call that has just been made must not be lost
        return seconds

    def steps(self, max_steps: int) -> Generator[float]:
        """Runs up to ``max_steps`` steps, one at a time, until no row is active, and yields each step's seconds."""
        for _ in range(max_steps):
            yield from self.run(1)

    def interrupt(self) -> None:
        self._interrupted = True

    @torch.inference_mode()
    def run_instruction(self, index: int) -> None:
        """Runs one instruction of the program, for tests that compare buffers after each."""
        ins = self.program[index]
        if bool(ins.row_mask.any()):
            REFERENCE[ins.op](ins)
