"""What the tests of single kernels share: a program of plain sizes to vary, and runs of one op or one instruction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.program import Program
from skipkernels.program.state import LAYOUTS, DecodeState
from skipkernels.program.table import Instruction
from skipkernels.skipping.policy import DensePolicy
from tests.cuda.kernels import HostKernels
from tests.executors.programs import Case, compare_program


def case(**changes: Any) -> Case:
    """One layer, one active row; every size is a multiple of what 16-byte loads want."""
    seq_lens = changes.get("seq_lens", (5,))
    values: dict[str, Any] = {
        "seq_lens": seq_lens,
        "active": (True,) * len(seq_lens),
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 50,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "group_size": 2,
        "dtype": torch.bfloat16,
        "policies": (DensePolicy(),),
        "seed": 1,
        "num_layers": 1,
        "layout": LAYOUTS["cuda"],
    }
    return Case(**{**values, **changes})


class OneOp:
    """Runs the instructions of one op with the kernels and all others as the reference does."""

    name = "one op"

    def __init__(self, op: str, program: Program, state: DecodeState, **options: int) -> None:
        self._op, self._program = op, program
        self._kernels, self._reference = HostKernels(program, state, **options), ReferenceExecutor(program, state)

    def run_instruction(self, index: int) -> None:
        executor = self._kernels if self._program[index].op == self._op else self._reference
        executor.run_instruction(index)


def compare_op(op: str, case: Case, **options: int) -> None:
    """The op's outputs agree with the reference's in the case's program; what must not be touched is not."""
    compare_program(case, lambda program, state: OneOp(op, program, state, **options))


def run_with_kernels(ins: Instruction, **options: int) -> None:
    """One instruction, without a program around it."""
    weights = [tensor for tensor in ins.tensors.values() if tensor is not None and tensor.dtype.is_floating_point]
    state = SimpleNamespace(k_cache=min(weights, key=lambda tensor: tensor.element_size()))
    HostKernels((ins,), cast(DecodeState, state), **options).run_instruction(0)
