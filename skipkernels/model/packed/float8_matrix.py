"""Float8Matrix: numbers of eight bits (e4m3), with one scale for all, for each row or for each tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from skipkernels.errors import ModelError
from skipkernels.model.float8_blocks import BLOCK_COLUMNS, float8_blocks
from skipkernels.model.matrix import Matrix

_CHUNK = 1 << 20
"""Weights computed at a time: 4 MB of floats."""
_NAN = 0x7F
"""But for its sign; there are no infinite numbers."""


@dataclass(frozen=True, eq=False)
class Float8Matrix:
    """Weights scale * number: ``scales`` [row tiles, column tiles] of ``tile`` rows and columns each, the last of them
    perhaps smaller; ``read_numbers`` f8_e4m3 [rows, ``columns``].

    Raises:
        ModelError: a scale is no finite number.
    """

    name: str
    columns: int
    scales: torch.Tensor
    tile: tuple[int, int]
    read_numbers: Callable[[], torch.Tensor]

    def __post_init__(self) -> None:
        if not torch.isfinite(self.scales).all():
            raise ModelError(f"{self.name}: its scales hold NaN or infinite values; the checkpoint is corrupt")

    def format(self) -> str:
        """f8_e4m3, or, where blocks of it would be cut, why."""
        name, width = "f8_e4m3", self.tile[1]
        if self.columns % BLOCK_COLUMNS:
            return f"{name} in rows of {self.columns} columns"
        return f"{name} in tiles of {width} columns" if width < self.columns and width % BLOCK_COLUMNS else name

    def rounds_scales(self) -> bool:
        return False

    def blocks(self) -> Matrix:
        of_block = torch.arange(0, self.columns, BLOCK_COLUMNS) // self.tile[1]
        data = torch.cat([float8_blocks(numbers, scales[:, of_block]) for _, numbers, scales in self._parts()])
        return Matrix(self.format(), len(data), self.columns, data)

    def copy_floats(self, target: torch.Tensor) -> None:
        of_column = torch.arange(self.columns) // self.tile[1]
        for rows, numbers, scales in self._parts():
            target[rows] = numbers.float() * scales[:, of_column]

    def _parts(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Some rows at a time, their numbers, and their scales, f32 [rows, column tiles].

        Raises:
            ModelError: a number is NaN.
        """
        numbers = self.read_numbers()
        step = max(1, _CHUNK // self.columns)
        for start in range(0, len(numbers), step):
            rows = slice(start, min(start + step, len(numbers)))
            if (numbers[rows].view(torch.uint8) & _NAN == _NAN).any():
                raise ModelError(f"{self.name}: its numbers hold NaN; the checkpoint is corrupt")
            yield rows, numbers[rows], self.scales[torch.arange(rows.start, rows.stop) // self.tile[0]].float()
