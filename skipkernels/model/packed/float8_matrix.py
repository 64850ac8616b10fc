"""Float8Matrix: numbers of eight bits (e4m3), with one scale for all, for each row or for each tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from skipkernels.errors import ModelError
from skipkernels.model.matrix import Matrix

_CHUNK = 1 << 20
"""Weights computed at a time: 4 MB of floats."""


@dataclass(frozen=True, eq=False)
class Float8Matrix:
    """Weights scale * number: ``scales`` [row tiles, column tiles] of ``tile`` rows and columns each, the last of them
    perhaps smaller; ``read_numbers`` f8_e4m3 [rows, columns].

    Raises:
        ModelError: a scale is no finite number.
    """

    name: str
    scales: torch.Tensor
    tile: tuple[int, int]
    read_numbers: Callable[[], torch.Tensor]

    def __post_init__(self) -> None:
        if not torch.isfinite(self.scales).all():
            raise ModelError(f"{self.name}: its scales hold NaN or infinite values; the checkpoint is corrupt")

    def format(self) -> str:
        return "f8_e4m3"

    def rounds_scales(self) -> bool:
        return False

    def blocks(self) -> Matrix:
        raise AssertionError(f"{self.name} holds floats of eight bits")

    def copy_floats(self, target: torch.Tensor) -> None:
        numbers = self.read_numbers()
        height, width = self.tile
        step = max(1, _CHUNK // numbers.shape[1])
        for start in range(0, len(numbers), step):
            part = numbers[start : start + step].float()
            of_row = torch.arange(start, start + len(part)) // height
            scales = self.scales[of_row].float().repeat_interleave(width, 1)[:, : part.shape[1]]
            target[start : start + len(part)] = part * scales
