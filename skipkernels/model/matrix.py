"""Matrix: a weight matrix in blocks of quantised weights, as GGUF files hold it, and what all matrices have in common.

A matrix of floats is a plain tensor. Both are operands of the decode program, each with a format of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from skipkernels.errors import ModelError

FLOAT_FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class BlockFormat:
    """One of GGUF's block types: ``block_bytes`` hold ``block_columns`` neighbouring weights of a row."""

    block_columns: int
    block_bytes: int

    def row_bytes(self, columns: int) -> int:
        return columns // self.block_columns * self.block_bytes


BLOCK_FORMATS = {
    "q8_0": BlockFormat(32, 34),
    "q4_0": BlockFormat(32, 18),
    "q4_1": BlockFormat(32, 20),
    "q5_0": BlockFormat(32, 22),
    "q5_1": BlockFormat(32, 24),
    "q4_k": BlockFormat(256, 144),
    "q5_k": BlockFormat(256, 176),
    "q6_k": BlockFormat(256, 210),
}
"""The block formats that the kernels compute with; the names are GGUF's types in lower case."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """``rows`` x ``columns`` weights in a block format.

    ``data`` is u8: in layout ``rows`` [rows, bytes of a row], GGUF's own bytes, possibly of a mapped file; in layout
    ``interleaved`` [bytes], rows side by side in the order that the C++ kernels read (``interleaved``).

    Raises:
        ModelError: the format is none of ``BLOCK_FORMATS``, or the sizes contradict each other.
    """

    format: str
    rows: int
    columns: int
    data: torch.Tensor
    layout: Literal["rows", "interleaved"] = field(default="rows", kw_only=True)

    def __post_init__(self) -> None:
        if self.format not in BLOCK_FORMATS:
            raise ModelError(f"matrix format {self.format!r} is not supported; use one of {', '.join(BLOCK_FORMATS)}")
        block = BLOCK_FORMATS[self.format]
        if self.columns % block.block_columns:
            raise ModelError(f"{self.format} needs a multiple of {block.block_columns} columns, got {self.columns}")
        if self.data.dtype != torch.uint8 or not self.data.is_contiguous():
            raise ModelError(f"the blocks of a matrix must be contiguous uint8, got {self.data.dtype}")
        expected = (self.rows, block.row_bytes(self.columns))
        if self.layout == "rows" and self.data.shape != expected:
            raise ModelError(
                f"{self.rows} x {self.columns} weights in {self.format} are {list(expected)} bytes, "
                f"got {list(self.data.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return (self,)

    def to(self, device: torch.device | str) -> Matrix:
        return Matrix(self.format, self.rows, self.columns, self.data.to(device), layout=self.layout)

    def dequantize(self) -> torch.Tensor:
        """The weights, f32 [rows, columns]: bit for bit what the ``gguf`` package makes of them."""
        return self.dequantize_rows(torch.arange(self.rows))

    def dequantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of the weights, f32 [rows, columns]."""
        if self.layout == "interleaved":
            from skipkernels import _C

            out = torch.empty(len(rows), self.columns)
            _C.dequantize_interleaved(self.format, self.columns, self.data.data_ptr(), rows.tolist(), out.data_ptr())
            return out
        import gguf

        blocks = self.data[rows.to(self.device)].cpu().numpy()
        kind = gguf.GGMLQuantizationType[self.format.upper()]
        return torch.from_numpy(gguf.quants.dequantize(blocks, kind)).to(self.device)

    def interleaved(self, num_threads: int = 1) -> Matrix:
        """A copy with 16 rows side by side, in the order that the C++ kernels read, on huge pages where the system
        grants them. Of the same size, but for the K formats' scales, which take 2.8 % more in q4_k."""
        from skipkernels import _C

        if self.layout == "interleaved":
            return self
        size = _C.interleaved_bytes(self.format, self.rows, self.columns)
        data = torch.empty(size, dtype=torch.uint8)  # torch aligns to 64 bytes, as the kernels' loads need
        _C.advise_huge_pages(data.data_ptr(), size)
        source = self.data.cpu()
        _C.interleave(self.format, self.rows, self.columns, source.data_ptr(), data.data_ptr(), num_threads)
        return Matrix(self.format, self.rows, self.columns, data, layout="interleaved")


@dataclass(frozen=True, eq=False)
class StackedMatrix:
    """Matrices of blocks on top of each other, each in its own format: q, k and v, or gate and up."""

    parts: tuple[Matrix, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= 3 or len({part.columns for part in self.parts}) != 1:
            raise ModelError(f"one to three matrices of as many columns can be stacked, got {self.parts}")

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.rows for part in self.parts), self.parts[0].columns

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def dequantize(self) -> torch.Tensor:
        """f32 [rows, columns]."""
        return torch.cat([part.dequantize() for part in self.parts])

    def interleaved(self, num_threads: int = 1) -> StackedMatrix:
        """A copy whose parts have 16 rows side by side."""
        return StackedMatrix(tuple(part.interleaved(num_threads) for part in self.parts))


AnyMatrix = torch.Tensor | Matrix | StackedMatrix
"""A weight matrix of the program: floats, blocks, or several matrices of blocks on top of each other."""


def formats_of(matrix: AnyMatrix) -> tuple[str, ...]:
    """The formats of a matrix's parts, from top to bottom."""
    if not isinstance(matrix, torch.Tensor):
        return tuple(part.format for part in matrix.parts)
    for name, dtype in FLOAT_FORMATS.items():
        if matrix.dtype == dtype:
            return (name,)
    raise ModelError(f"a matrix of {matrix.dtype} is not supported; use one of {', '.join(FLOAT_FORMATS)}")


def native_parts(matrix: AnyMatrix) -> list[tuple[int, str, int]]:
    """Address, format and rows of every part, as the native executors take them."""
    if isinstance(matrix, torch.Tensor):
        return [(matrix.data_ptr(), formats_of(matrix)[0], matrix.shape[0])]
    return [(part.data.data_ptr(), part.format, part.rows) for part in matrix.parts]


def dequantized(matrix: AnyMatrix) -> torch.Tensor:
    """The weights as fp32 [rows, columns]."""
    return matrix.float() if isinstance(matrix, torch.Tensor) else matrix.dequantize()


def float_tensor(matrix: AnyMatrix) -> torch.Tensor:
    """A matrix of floats, for those who know no other.

    Raises:
        ModelError: it is quantised.
    """
    if isinstance(matrix, torch.Tensor):
        return matrix
    raise ModelError(
        f"floats are needed here, got a matrix in {' and '.join(formats_of(matrix))}; load the model with dtype bf16 "
        "(--dtype bf16)"
    )


def as_tensor(matrix: AnyMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The weights for torch: a matrix of floats as it is, one of blocks dequantised into ``dtype``."""
    return matrix if isinstance(matrix, torch.Tensor) else matrix.dequantize().to(dtype)


def weight_rows(matrix: AnyMatrix, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of the weights [rows, columns]: of floats as they are, of one matrix of blocks as fp32."""
    if isinstance(matrix, torch.Tensor):
        return matrix[rows]
    if isinstance(matrix, StackedMatrix):
        raise ModelError("rows of stacked matrices are not looked up")
    return matrix.dequantize_rows(rows)


def stacked(matrices: Sequence[Matrix]) -> Matrix | StackedMatrix:
    """Several matrices on top of each other."""
    return matrices[0] if len(matrices) == 1 else StackedMatrix(tuple(matrices))
