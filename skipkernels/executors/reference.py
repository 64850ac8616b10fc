"""ReferenceExecutor: replays the program op by op in PyTorch. Slow, and the definition of right."""

from __future__ import annotations

import time
from collections.abc import Iterator

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

    @torch.inference_mode()
    def run(self, max_steps: int) -> list[float]:
        """Runs up to ``max_steps`` steps, until no row is active. Returns each step's seconds."""
        seconds: list[float] = []
        while len(seconds) < max_steps and bool(self.state.active.any()):
            started = time.perf_counter()
            for index in range(len(self.program)):
                self.run_instruction(index)
            seconds.append(time.perf_counter() - started)
        return seconds

    def steps(self) -> Iterator[float]:
        """Runs until no row is active, one step at a time, and yields each step's seconds."""
        while seconds := self.run(1):
            yield seconds[0]

    @torch.inference_mode()
    def run_instruction(self, index: int) -> None:
        """Runs one instruction of the program, for tests that compare buffers after each."""
        ins = self.program[index]
        if bool(ins.when.any()):
            REFERENCE[ins.op](ins)
