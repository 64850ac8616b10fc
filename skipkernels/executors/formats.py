"""Which matrix formats an executor takes."""

from __future__ import annotations

from collections.abc import Collection

import torch

from skipkernels.errors import DeviceError
from skipkernels.model.config import dtype_name
from skipkernels.model.matrix import FLOAT_FORMATS, formats_of
from skipkernels.program import Program
from skipkernels.program.state import DecodeState


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


def require_interleaved_int8(program: Program, executor: str) -> None:
    """Refuses what kernels for interleaved rows and int8 activations do not compute.

    Raises:
        DeviceError: names the matrix and what to change.
    """
    for ins in program:
        for name, matrix in ins.matrices.items():
            if isinstance(matrix, torch.Tensor):
                continue
            if ins.activations != "int8":
                raise DeviceError(
                    f"the {executor} executor multiplies {name} in {matrix.parts[0].format} with int8 activations, not "
                    f"{ins.activations}; use the reference executor, or load the model with dtype fp32"
                )
            if any(part.layout != "interleaved" for part in matrix.parts):
                raise DeviceError(f"the {executor} executor needs {name} interleaved (Matrix.interleaved)")


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
