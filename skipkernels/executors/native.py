"""A program as the native executors take it."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from skipkernels import _C
from skipkernels.model.config import dtype_name
from skipkernels.model.matrix import native_parts
from skipkernels.program import Program
from skipkernels.program.state import DecodeState
from skipkernels.program.table import OPS, Instruction


def native_program(program: Program, state: DecodeState, native: ModuleType = _C) -> list[Any]:
    """The instructions as structs of ``native`` with their tensors' addresses; the caller keeps the tensors alive."""
    dtype = dtype_name(state.k_cache.dtype)
    return [_native_instruction(ins, dtype, native) for ins in program]


def _native_instruction(ins: Instruction, dtype: str, native: ModuleType) -> Any:
    operands: dict[str, Any] = {
        name: 0 if tensor is None else tensor.data_ptr()
        for name, tensor in ins.tensors.items()
        if OPS[ins.op].tensors[name].dtype != "matrix"
    }
    operands.update({name: native_parts(matrix) for name, matrix in ins.matrices.items()})
    # a size only an absent operand has is zero, and not looked at
    operands.update({symbol: ins.sizes.get(symbol, 0) for symbol in OPS[ins.op].symbols})
    operands.update(ins.scalars)
    return native.Instruction(ins.op, dtype, ins.row_mask.data_ptr(), ins.row_mask.numel(), operands)
