"""An executor of Triton kernels for tests: some ops by them, the others by the reference."""

from collections.abc import Collection, Iterator

from skipkernels.kernels.triton import TRITON
from skipkernels.program import Program
from skipkernels.program.reference import REFERENCE
from skipkernels.program.state import DecodeState


class TritonExecutor:
    name = "triton"

    def __init__(self, program: Program, state: DecodeState, ops: Collection[str] = tuple(TRITON)) -> None:
        self.program = program
        self.state = state
        self.ops = ops

    def run(self, max_steps: int) -> list[float]:
        raise NotImplementedError

    def steps(self) -> Iterator[float]:
        raise NotImplementedError

    def run_instruction(self, index: int) -> None:
        ins = self.program[index]
        (TRITON if ins.op in self.ops else REFERENCE)[ins.op](ins)
