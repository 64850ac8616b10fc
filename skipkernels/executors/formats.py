"""Which matrix formats an executor takes."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch

from skipkernels.errors import DeviceError
from skipkernels.model.config import dtype_name
from skipkernels.model.matrix import FLOAT_FORMATS, BlockLayout, Matrix, StackedMatrix, TransposedMatrix, formats_of
from skipkernels.model.weights import NO_COLUMNS_IN_PLANES
from skipkernels.program import Program
from skipkernels.program.state import DecodeState
from skipkernels.program.table import Instruction


def require_formats(program: Program, executor: str, formats: Collection[str] = tuple(FLOAT_FORMATS)) -> None:
    """Refuses a program with a matrix in a format that the executor has no kernel for.

    Raises:
        DeviceError: names the matrix, its format and the formats that are known.
    """
    for ins in program:
        for name, matrix in ins.matrices.items():
            for format in formats_of(matrix):
                if format not in formats:
                    raise DeviceError(
                        f"the {executor} executor has no kernel for {name} in {format}; it takes {', '.join(formats)}"
                    )


_LAYOUTS: dict[tuple[str, str], tuple[BlockLayout, ...]] = {
    ("gate_up_act", "gate_up_proj"): ("interleaved", "single_rows"),
    ("up_proj_mul", "up_proj"): ("single_rows",),
    ("down_proj_neurons_add", "down_proj"): ("single_columns",),
}
"""In which the C++ kernels read an op's blocks, where not ``interleaved``."""


def _of_blocks(program: Program) -> Iterator[tuple[Instruction, str, Matrix | StackedMatrix | TransposedMatrix]]:
    """Every matrix of blocks, the instruction it belongs to and its operand's name."""
    for ins in program:
        for name, matrix in ins.matrices.items():
            if not isinstance(matrix, torch.Tensor):
                yield ins, name, matrix


def require_arranged_int8(program: Program, executor: str) -> None:
    """Refuses what kernels for arranged blocks and int8 activations do not compute.

    Raises:
        DeviceError: names the matrix and what to change.
    """
    for ins, name, matrix in _of_blocks(program):
        if ins.activations != "int8":
            raise DeviceError(
                f"the {executor} executor multiplies {name} in {matrix.parts[0].format} with int8 activations, not "
                f"{ins.activations}; use the reference executor, or load the model with dtype fp32"
            )
        layouts = _LAYOUTS.get((ins.op, name), ("interleaved",))
        for part in matrix.parts:
            if part.layout not in layouts:
                raise DeviceError(
                    f"the {executor} executor needs {name} of {ins.op} in layout {' or '.join(layouts)}, got "
                    f"{part.layout} (Matrix.arranged)"
                )


READ_IN_PARTS = ("qkv_rope_append", "gate_up_act")
"""Ops whose GPU kernels read a matrix whose parts have formats of their own."""
_OF_EXPERTS = ("route_experts", "experts_gate_up_act", "experts_down_proj_add", "experts_down_proj_neurons_add")
"""Ops whose GPU kernels read floats only."""


def require_planes_fp32(program: Program, executor: str) -> None:
    """Refuses what GPU kernels do not compute: blocks lie in planes and are multiplied with fp32 activations.

    Raises:
        DeviceError: names the matrix and what to change.
    """
    for ins, name, matrix in _of_blocks(program):
        if ins.op in _OF_EXPERTS:
            raise DeviceError(
                f"the {executor} executor has no kernel of {ins.op} for {name} in {matrix.parts[0].format}; load "
                "the model with dtype='bf16' (--dtype bf16), or decode on device 'cpu'"
            )
        if isinstance(matrix, TransposedMatrix):
            raise DeviceError(NO_COLUMNS_IN_PLANES.format(matrix.matrix.format))
        if ins.activations != "fp32":
            raise DeviceError(
                f"the {executor} executor multiplies {name} in {matrix.parts[0].format} with fp32 activations, not "
                f"{ins.activations}"
            )
        if len(matrix.parts) > 1 and ins.op not in READ_IN_PARTS:
            raise DeviceError(
                f"the {executor} executor has no kernel of {ins.op} for {name} in several formats "
                f"({', '.join(part.format for part in matrix.parts)}); load the model with dtype='bf16'"
            )
        for part in matrix.parts:
            if part.layout != "planes":
                raise DeviceError(
                    f"the {executor} executor needs {name} of {ins.op} in layout planes, got {part.layout} "
                    "(weights.into_planes)"
                )


def require_cache_dtype(program: Program, executor: str, state: DecodeState) -> None:
    """Refuses a program whose float matrices differ from its cache, for kernels that know one dtype.

    Raises:
        DeviceError: names the matrix and both dtypes.
    """
    cache = state.k_cache.dtype
    for ins in program:
        for name, matrix in ins.matrices.items():
            if isinstance(matrix, torch.Tensor) and matrix.dtype != cache:
                raise DeviceError(
                    f"the {executor} executor needs weights and cache in one dtype, got {name} in "
                    f"{dtype_name(matrix.dtype)} and a cache in {dtype_name(cache)}"
                )
