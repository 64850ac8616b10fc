"""ComparingExecutor: runs each instruction in an executor and in the reference, and records how far they differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from skipkernels.executors import Executor
from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.program.state import DecodeState
from skipkernels.program.table import OPS, Instruction


@dataclass(frozen=True)
class Difference:
    """How far one operand of one instruction is from the reference's.

    ``relative`` is the largest difference over the largest magnitude of the reference's operand; infinite where NaN or
    infinities stand in other places. Of integers it is the share of elements that differ.
    """

    step: int
    instruction: int  # its number in the program
    op: str
    operand: str
    relative: float


class ComparingExecutor(ReferenceExecutor):
    """Runs ``actual`` and the reference from the same buffers, instruction by instruction.

    The program goes on with what ``actual`` computed, so a difference is that of one instruction alone and does not
    carry over. Every buffer that an instruction writes is copied three times: a debugging aid, not a fast one.
    """

    name = "comparison"

    def __init__(self, actual: Executor, state: DecodeState) -> None:
        super().__init__(actual.program, state)
        self.differences: list[Difference] = []
        self._actual = actual
        self._step = 0

    @torch.inference_mode()
    def run_instruction(self, index: int) -> None:
        ins = self.program[index]
        if index == 0:
            self._step += 1
        if not bool(ins.row_mask.any()):
            return
        outputs = _outputs(ins)
        before = {name: tensor.clone() for name, tensor in outputs.items()}
        self._actual.run_instruction(index)
        actual = {name: tensor.clone() for name, tensor in outputs.items()}
        for name, tensor in outputs.items():
            tensor.copy_(before[name])
        super().run_instruction(index)
        for name, tensor in outputs.items():
            relative = _relative_difference(_defined(name, actual), _defined(name, outputs))
            self.differences.append(Difference(self._step, index, ins.op, name, relative))
            tensor.copy_(actual[name])


def _outputs(ins: Instruction) -> dict[str, torch.Tensor]:
    written = {
        name: ins.tensors[name] for name, field in OPS[ins.op].tensors.items() if field.access in ("out", "inout")
    }
    return {name: tensor for name, tensor in written.items() if isinstance(tensor, torch.Tensor)}


def _defined(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor without what the op leaves undefined: a list of neurons ends at its number."""
    tensor = tensors[name]
    return tensor[: int(tensors["num_neurons"])] if name == "neurons" else tensor


def _relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    if not actual.is_floating_point():
        return float((actual != expected).double().mean()) if actual.numel() else 0.0
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    largest = float((actual[finite] - expected[finite]).abs().max())
    return largest / max(float(expected[finite].abs().max()), torch.finfo(torch.float32).tiny)
