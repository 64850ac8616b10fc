"""Whole numbers of 4 or 8 bits, packed into words of 32."""

from __future__ import annotations

import torch


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """i32 [rows, words] -> u8 [rows, words * 32 / bits], a word's lowest bits first; of 4 or 8 bits each."""
    octets = words.contiguous().view(torch.uint8)  # little-endian, as GGUF's blocks are read too
    if bits == 8:
        return octets
    return torch.stack([octets & 15, octets >> 4], -1).flatten(-2)
