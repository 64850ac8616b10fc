"""IntegerMatrix: whole numbers, and for each row of each group of columns a scale and a zero point.

What GPTQ (arXiv 2210.17323), AWQ (arXiv 2306.00978) and compressed-tensors pack: weights scale * (level - zero). A
block of 32 neighbouring columns lies in one group, but in act-order; with the group's scale in fp16 it is one of
GGUF's blocks, without another rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from skipkernels.errors import ModelError
from skipkernels.model.matrix import Matrix

_BLOCK = 32
_SIGNED = {"q4_0": 8, "q5_0": 16, "q8_0": 128}
"""Formats of weights scale * n, n in -half .. half - 1."""
_CHUNK = 1 << 20
"""Weights computed at a time: 4 MB of floats, and a few times that beside them."""


@dataclass(frozen=True, eq=False)
class IntegerMatrix:
    """``scales`` [rows, groups] of any float dtype, ``zeros`` i16 [rows, groups], ``groups`` i64 [columns]: the group
    of each column, ``read_levels`` the whole numbers of ``bits`` bits, u8 [rows, columns].

    Raises:
        ModelError: a scale is no finite number.
    """

    name: str
    bits: int
    scales: torch.Tensor
    zeros: torch.Tensor
    groups: torch.Tensor
    read_levels: Callable[[], torch.Tensor]

    def __post_init__(self) -> None:
        if not torch.isfinite(self.scales).all():
            raise ModelError(f"{self.name}: its scales hold NaN or infinite values; the checkpoint is corrupt")

    def format(self) -> str:
        """The smallest block format that holds every value."""
        name = f"int{self.bits}"
        if len(self.groups) % _BLOCK:
            return f"{name} in rows of {len(self.groups)} columns"
        blocks = self.groups.view(-1, _BLOCK)
        if (blocks != blocks[:, :1]).any():
            in_order = bool((self.groups.diff() >= 0).all())
            return f"{name} in groups that cut blocks of 32" if in_order else f"{name} in act-order"
        if self._scale_error() > 2.0**-11:  # half a unit in the last place, of all but the smallest
            return f"{name} with scales beyond fp16"
        if (signed := self._signed()) == "q4_0":
            return signed
        if self.bits == 4 and self._minima_are_exact():
            return "q4_1"
        return signed or f"{name} with a zero point"

    def rounds_scales(self) -> bool:
        return self._scale_error() > 0

    def blocks(self) -> Matrix:
        format, of_block = self.format(), self.groups[::_BLOCK]
        levels = self.read_levels()
        rows, columns = levels.shape
        levels = levels.view(rows, -1, _BLOCK)
        scales, zeros = self.scales.half()[:, of_block, None], self.zeros[:, of_block, None]
        parts = [_bytes(scales)]
        if format == "q4_1":
            parts.append(_bytes(-(scales.float() * zeros).half()))
        else:
            levels = levels - (zeros - _SIGNED[format])
        parts += _packed(levels, format)
        return Matrix(format, rows, columns, torch.cat(parts, -1).view(rows, -1))

    def copy_floats(self, target: torch.Tensor) -> None:
        levels = self.read_levels()
        step = max(1, _CHUNK // levels.shape[1])
        for start in range(0, len(levels), step):
            rows = slice(start, start + step)
            scales, zeros = self.scales[rows].float(), self.zeros[rows].float()
            target[rows] = scales[:, self.groups] * (levels[rows] - zeros[:, self.groups])

    def _scale_error(self) -> float:
        """The largest part of a scale that fp16 loses."""
        scales = self.scales.double()
        error = (scales.half().double() - scales).abs() / scales.abs()
        return float(torch.where(scales == 0, 0.0, error).max())

    def _signed(self) -> str:
        """The smallest of the signed formats that holds every level minus its zero; empty: none."""
        least, most = -int(self.zeros.max()), (1 << self.bits) - 1 - int(self.zeros.min())
        return next((format for format, half in _SIGNED.items() if -half <= least and most < half), "")

    def _minima_are_exact(self) -> bool:
        minima = self.scales.half().float() * self.zeros
        return torch.equal(minima.half().float(), minima)


def _packed(levels: torch.Tensor, format: str) -> list[torch.Tensor]:
    """[rows, blocks, 32] -> the bytes of each block behind its scale."""
    if format == "q8_0":
        return [(levels - 128).to(torch.int8).view(torch.uint8)]
    levels = levels.to(torch.uint8)
    low = levels & 15
    nibbles = low[..., :16] | low[..., 16:] << 4
    if format != "q5_0":
        return [nibbles]
    places = torch.arange(8, dtype=torch.uint8)
    fifth = ((levels >> 4).unflatten(-1, (4, 8)) << places).sum(-1, dtype=torch.uint8)
    return [fifth, nibbles]


def _bytes(halves: torch.Tensor) -> torch.Tensor:
    """fp16 [..., 1] -> u8 [..., 2]."""
    return halves.contiguous().view(torch.uint8)
