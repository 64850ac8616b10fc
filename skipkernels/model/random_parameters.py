"""RandomParameters: weights of the right shapes, formats and scale, for timing only."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from skipkernels.model.block_quantizer import quantize
from skipkernels.model.matrix import BLOCK_FORMATS, Matrix

_BLOCKS = 4096
"""Different ones in a format; the rest of a matrix repeats them."""


class RandomParameters:
    """Parameters of the ``shapes`` given, matrices named in ``formats`` in blocks of those formats, others in fp32."""

    source = "random weights"

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, str], seed: int = 0) -> None:
        self._shapes, self._formats = shapes, formats
        self._generator = torch.Generator().manual_seed(seed)
        self._blocks = {kind: self._random_blocks(kind) for kind in set(formats.values())}

    def _random_blocks(self, kind: str) -> torch.Tensor:
        columns = BLOCK_FORMATS[kind].block_columns
        return quantize(torch.randn(_BLOCKS, columns, generator=self._generator) * 0.02, kind).data

    def format(self, name: str) -> str:
        return self._formats.get(name, "f32")

    def blocks(self, name: str) -> Matrix:
        kind, (rows, columns) = self._formats[name], self._shapes[name]
        block = BLOCK_FORMATS[kind]
        count = rows * (columns // block.block_columns)
        data = self._blocks[kind].repeat(-(-count // _BLOCKS), 1)[:count]
        return Matrix(kind, rows, columns, data.reshape(rows, block.row_bytes(columns)))

    def copy_floats(self, name: str, target: torch.Tensor) -> None:
        if target.dim() == 1:
            target.fill_(1.0)
        else:
            target.copy_(torch.randn(target.shape, generator=self._generator) * 0.02)

    def contents(self) -> str:
        return ""
