"""Matrix: a weight matrix in blocks of quantised weights, and what all matrices have in common.

A matrix of floats is a plain tensor. Both are operands of the decode program, each with a format of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import torch

from skipkernels.errors import ModelError
from skipkernels.model.float8_blocks import numbers_times_scales
from skipkernels.model.planes import arranged_in_planes, dequantized_planes

FLOAT_FORMATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class BlockFormat:
    """``block_bytes`` hold ``block_columns`` neighbouring weights of a row: ``code_bytes`` a code for each of them, the
    others what they share."""

    block_columns: int
    block_bytes: int
    code_bytes: int

    def row_bytes(self, columns: int) -> int:
        return columns // self.block_columns * self.block_bytes


GGUF_FORMATS = {
    "q8_0": BlockFormat(32, 34, 32),
    "q4_0": BlockFormat(32, 18, 16),
    "q4_1": BlockFormat(32, 20, 16),
    "q5_0": BlockFormat(32, 22, 20),
    "q5_1": BlockFormat(32, 24, 20),
    "q4_k": BlockFormat(256, 144, 128),
    "q5_k": BlockFormat(256, 176, 160),
    "q6_k": BlockFormat(256, 210, 192),
}
"""GGUF's block types that kernels compute with, on CPUs and GPUs; the names are its own in lower case."""
BLOCK_FORMATS = {**GGUF_FORMATS, "f8_e4m3": BlockFormat(128, 132, 128)}
"""All block formats that kernels compute with: f8_e4m3 (``model.float8_blocks``) on GPUs only."""


BlockLayout = Literal["rows", "interleaved", "single_rows", "single_columns", "planes"]
"""How the blocks of a matrix lie: one behind the other, as in a file; 16 rows side by side; every row, or every column,
in one piece, so that some can be left unread (csrc/cpu/blocks.h); for GPUs, in planes (``model.planes``)."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """``rows`` x ``columns`` weights in a block format.

    ``data`` is u8: in layout ``rows`` [rows, bytes of a row], for GGUF's formats its own bytes, possibly of a mapped
    file; in other layouts [bytes], in an order that kernels read (``arranged``).

    Raises:
        ModelError: the format is none of ``BLOCK_FORMATS``, or the sizes contradict each other.
    """

    format: str
    rows: int
    columns: int
    data: torch.Tensor
    layout: BlockLayout = field(default="rows", kw_only=True)

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

    @property
    def T(self) -> TransposedMatrix:
        return TransposedMatrix(self)

    def to(self, device: torch.device | str) -> Matrix:
        return Matrix(self.format, self.rows, self.columns, self.data.to(device), layout=self.layout)

    def dequantize(self) -> torch.Tensor:
        """The weights, f32 [rows, columns]: of GGUF's formats bit for bit what the ``gguf`` package makes of them."""
        return self.dequantize_rows(torch.arange(self.rows))

    def dequantize_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of the weights, f32 [rows, columns]."""
        if self.layout == "planes":
            return dequantized_planes(self.format, self.rows, self.columns, self.data, rows)
        if self.layout != "rows":
            from skipkernels import _C

            out = torch.empty(len(rows), self.columns)
            _C.dequantize_arranged(
                self.layout,
                self.format,
                self.rows,
                self.columns,
                self.data.data_ptr(),
                rows.tolist(),
                out.data_ptr(),
            )
            return out
        blocks = self.data[rows.to(self.device)]
        if self.format not in GGUF_FORMATS:
            return numbers_times_scales(blocks)
        import gguf

        kind = gguf.GGMLQuantizationType[self.format.upper()]
        return torch.from_numpy(gguf.quants.dequantize(blocks.cpu().numpy(), kind)).to(self.device)

    def split(self, rows: int) -> StackedMatrix:
        """Its first ``rows`` rows on top of the others, of a matrix in layout ``rows``."""
        assert self.layout == "rows"
        parts = (rows, self.data[:rows]), (self.rows - rows, self.data[rows:])
        return StackedMatrix(tuple(Matrix(self.format, count, self.columns, data) for count, data in parts))

    def interleaved(self, num_threads: int = 1) -> Matrix:
        """A copy with 16 rows side by side: ``arranged``."""
        return self.arranged("interleaved", num_threads)

    def arranged(self, layout: BlockLayout, num_threads: int = 1) -> Matrix:
        """A copy in an order that kernels read: ``planes`` on the matrix's own device, the others on a CPU, on huge
        pages where the system grants them. Of the same size, but for the K formats' scales, which take 2.8 % more in
        q4_k, for columns in one piece, whose rows are filled up to a multiple of 64 (8 bits) to 512 (5 bits), and for
        planes, whose columns are filled up to a multiple of 128.

        Raises:
            ModelError: it lies in another order already.
        """
        from skipkernels import _C

        if self.layout == layout:
            return self
        if self.layout != "rows":
            raise ModelError(f"a matrix in layout {self.layout} cannot be brought into {layout}; load it again")
        if layout == "planes":
            data = arranged_in_planes(self.format, self.columns, self.data)
            return Matrix(self.format, self.rows, self.columns, data, layout=layout)
        size = _C.arranged_bytes(layout, self.format, self.rows, self.columns)
        data = torch.empty(size, dtype=torch.uint8)  # torch aligns to 64 bytes, as the kernels' loads need
        _C.advise_huge_pages(data.data_ptr(), size)
        source = self.data.cpu()
        _C.arrange(layout, self.format, self.rows, self.columns, source.data_ptr(), data.data_ptr(), num_threads)
        return Matrix(self.format, self.rows, self.columns, data, layout=layout)


@dataclass(frozen=True, eq=False)
class TransposedMatrix:
    """A matrix of blocks whose columns take the place of rows: a down_proj, one neuron a row."""

    matrix: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.columns, self.matrix.rows

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes

    @property
    def parts(self) -> tuple[Matrix, ...]:
        return self.matrix.parts

    def dequantize(self) -> torch.Tensor:
        """f32 [columns, rows] of the matrix."""
        return self.matrix.dequantize().T


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
"""A weight matrix of a model: floats, blocks, or several matrices of blocks on top of each other."""

MatrixOperand = AnyMatrix | TransposedMatrix
"""What an instruction multiplies with."""


def block_formats_on(device: torch.device | str) -> Mapping[str, BlockFormat]:
    """The block formats that a device's kernels multiply; others are to become floats."""
    return BLOCK_FORMATS if torch.device(device).type == "cuda" else GGUF_FORMATS


def formats_of(matrix: MatrixOperand) -> tuple[str, ...]:
    """The formats of a matrix's parts, from top to bottom."""
    if not isinstance(matrix, torch.Tensor):
        return tuple(part.format for part in matrix.parts)
    for name, dtype in FLOAT_FORMATS.items():
        if matrix.dtype == dtype:
            return (name,)
    raise ModelError(f"a matrix of {matrix.dtype} is not supported; use one of {', '.join(FLOAT_FORMATS)}")


def native_parts(matrix: MatrixOperand) -> list[tuple[int, str, BlockLayout, int]]:
    """Address, format, layout and rows of every part, as the native executors take them. CUDA kernels know one layout
    of blocks, planes, which to them is that of rows."""
    if isinstance(matrix, torch.Tensor):
        return [(matrix.data_ptr(), formats_of(matrix)[0], "rows", matrix.shape[0])]
    return [
        (part.data.data_ptr(), part.format, "rows" if part.layout == "planes" else part.layout, part.rows)
        for part in matrix.parts
    ]


def dequantized(matrix: MatrixOperand) -> torch.Tensor:
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


def column_nbytes(matrix: AnyMatrix) -> float:
    """Bytes that are not read where one column is left out, as it lies; of columns in one piece with what fills them
    up. What a column shares with its neighbours stays: 31 more would have to be left out."""
    if not isinstance(matrix, Matrix):
        return matrix.nbytes / matrix.shape[1]
    if matrix.layout == "single_columns":
        from skipkernels import _C

        return _C.single_column_bytes(matrix.format, matrix.rows, matrix.columns)
    return matrix.rows * BLOCK_FORMATS[matrix.format].code_bytes / BLOCK_FORMATS[matrix.format].block_columns


def halves(matrix: AnyMatrix) -> tuple[torch.Tensor | Matrix, torch.Tensor | Matrix]:
    """The upper and the lower half of a matrix, such as gate_proj and up_proj of gate_up_proj."""
    if isinstance(matrix, torch.Tensor):
        upper, lower = matrix.chunk(2)
        return upper, lower
    stack = matrix.split(matrix.rows // 2) if isinstance(matrix, Matrix) else matrix
    return stack.parts[0], stack.parts[1]


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


def merged(parts: Sequence[Matrix]) -> list[Matrix]:
    """The same rows in as few matrices as there are runs of one format, of matrices in layout ``rows``."""
    found: list[Matrix] = []
    for format, run in groupby(parts, key=lambda part: part.format):
        same = list(run)
        rows, data = sum(part.rows for part in same), torch.cat([part.data for part in same])
        found.append(same[0] if len(same) == 1 else Matrix(format, rows, same[0].columns, data))
    return found


def stacked(matrices: Sequence[Matrix]) -> Matrix | StackedMatrix:
    """Several matrices on top of each other."""
    return matrices[0] if len(matrices) == 1 else StackedMatrix(tuple(matrices))
