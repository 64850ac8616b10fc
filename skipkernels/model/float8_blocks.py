"""Float8 blocks, in format f8_e4m3: behind an fp32 scale the 128 numbers of eight bits (e4m3) that it multiplies.

As many columns as a group of the planes that GPU kernels read has, so that a group has one scale.
"""

from __future__ import annotations

import torch

BLOCK_COLUMNS = 128
_SCALE_BYTES = 4


def float8_blocks(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """f8_e4m3 [rows, columns] and f32 [rows, columns / 128] -> u8 [rows, bytes of a row]."""
    rows = len(numbers)
    shared = scales.contiguous().view(torch.uint8).view(rows, -1, _SCALE_BYTES)
    return torch.cat([shared, numbers.view(torch.uint8).view(rows, -1, BLOCK_COLUMNS)], dim=2).flatten(1)


def numbers_times_scales(blocks: torch.Tensor) -> torch.Tensor:
    """The weights of ``float8_blocks``, f32 [rows, columns]."""
    parts = blocks.view(len(blocks), -1, _SCALE_BYTES + BLOCK_COLUMNS)
    scales = parts[:, :, :_SCALE_BYTES].contiguous().view(torch.float32)
    numbers = parts[:, :, _SCALE_BYTES:].contiguous().view(torch.float8_e4m3fn)
    return (numbers.float() * scales).flatten(1)
