"""Blocks as GPU kernels read them: the codes of a row in 32-bit words, its scales in planes beside them.

A row is cut into groups of 128 columns, the last filled up with blocks whose scales are 0. In a group, lane t of four
and block j of four share a word: a lane's 16 bytes are four neighbouring words, and four lanes read 64 bytes of a row.
Of block j lane t has columns 4t .. 4t + 3 and 16 + 4t .. 16 + 4t + 3: the sixteen of four lanes in a half of a block,
which tensor cores take together, are one of q6_k's sub-blocks.

A word has eight codes of 4 bits, or four of 8 bits, in two words for the halves of a block. Neighbouring columns lie
16 bits apart: a shift and a mask leave a pair of them in the halves of a register. Planes, each from a multiple of 16
bytes on, of all rows:
  words   i32 [rows, groups, lane, block], of 8 bits [rows, groups, half, lane, block]
  high    of 5 and 6 bits, for each word u8 or u16: the upper one or two bits of code i at bit i or 2i
  scales  [rows, groups, block]: fp16 d (q8_0, q4_0, q5_0), fp16 d and m (q4_1, q5_1), u8 scale and minimum (q4_k,
          q5_k), i8 scales of the block's halves (q6_k); of f8_e4m3 [rows, groups]: fp32 d
  supers  of the K formats [rows, groups / 2]: fp16 d and dmin, of q6_k fp16 d
A weight is d * (code - offset) + m; codes of 8 bits are signed whole numbers, those of f8_e4m3 floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

GROUP_COLUMNS = 128
_ALIGNMENT = 16
_CHUNK = 1 << 22
"""Weights brought into order at a time: what it takes beside them is a few times their bytes."""

Scales = Literal["half", "half_and_min", "k", "q6_k", "group"]
"""``group``: one for a group, of codes that are floats."""


@dataclass(frozen=True)
class PlaneFormat:
    """How a format's codes and scales are laid out."""

    word_codes: int  # in 32 bits
    high_bits: int  # of a code, beyond those in its word
    offset: int
    scales: Scales

    @property
    def group_words(self) -> int:
        return GROUP_COLUMNS // self.word_codes

    @property
    def scale_bytes(self) -> int:
        """Of a group."""
        return {"half_and_min": 16, "group": 4}.get(self.scales, 8)

    @property
    def super_bytes(self) -> int:
        """Of two groups."""
        return {"k": 4, "q6_k": 2}.get(self.scales, 0)


PLANE_FORMATS = {
    "q8_0": PlaneFormat(4, 0, 0, "half"),
    "q4_0": PlaneFormat(8, 0, 8, "half"),
    "q4_1": PlaneFormat(8, 0, 0, "half_and_min"),
    "q5_0": PlaneFormat(8, 1, 16, "half"),
    "q5_1": PlaneFormat(8, 1, 0, "half_and_min"),
    "q4_k": PlaneFormat(8, 0, 0, "k"),
    "q5_k": PlaneFormat(8, 1, 0, "k"),
    "q6_k": PlaneFormat(8, 2, 32, "q6_k"),
    "f8_e4m3": PlaneFormat(4, 0, 0, "group"),
}


@dataclass(frozen=True)
class PlaneSizes:
    """Groups of a row, and where the planes of a matrix begin, in bytes."""

    groups: int
    high: int
    scales: int
    supers: int
    nbytes: int

    @classmethod
    def of(cls, format: str, rows: int, columns: int) -> PlaneSizes:
        kind, groups = PLANE_FORMATS[format], -(-columns // GROUP_COLUMNS)
        words = rows * groups * kind.group_words
        scales, supers = rows * groups * kind.scale_bytes, rows * groups * kind.super_bytes // 2
        ends = [0]
        for size in (4 * words, words * kind.high_bits, scales, supers):
            ends.append(ends[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        return cls(groups, *ends[1:])


def arranged_in_planes(format: str, columns: int, source: torch.Tensor) -> torch.Tensor:
    """Blocks u8 [rows, bytes of a row] as planes, u8 [bytes], on the device that they are on."""
    kind, rows = PLANE_FORMATS[format], len(source)
    padding = PlaneSizes.of(format, rows, columns).groups * GROUP_COLUMNS - columns
    out = torch.zeros(PlaneSizes.of(format, rows, columns).nbytes, dtype=torch.uint8, device=source.device)
    words, high, scales, supers = _planes(format, rows, columns, out)
    for part in _parts(rows, columns):
        codes, own_scales, own_supers = _READERS[format](source[part])
        low, upper = _packed(kind, torch.nn.functional.pad(codes, (0, padding)))
        words[part], high[part] = low, upper
        scales[part, : own_scales.shape[1]] = own_scales
        supers[part] = own_supers
    return out


def dequantized_planes(format: str, rows: int, columns: int, data: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The weights of the rows ``chosen``, f32 [chosen, columns]."""
    kind, out = PLANE_FORMATS[format], torch.empty(len(chosen), columns, device=data.device)
    words, high, scales, supers = _planes(format, rows, columns, data)
    chosen = chosen.to(data.device)
    for part in _parts(len(chosen), columns):
        own = chosen[part]
        levels = _levels(kind, words[own], high[own])
        d, m = _scales_of(kind, scales[own], supers[own])
        weights = levels.view(*d.shape, -1) * d[..., None]
        out[part] = (weights if m is None else weights + m[..., None]).flatten(1)[:, :columns]
    return out


def _parts(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // columns)
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _planes(format: str, rows: int, columns: int, data: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The planes as bytes [rows, ...]: words and high with an axis for the words of a row."""
    kind, sizes = PLANE_FORMATS[format], PlaneSizes.of(format, rows, columns)
    words = sizes.groups * kind.group_words

    def plane(start: int, *shape: int) -> torch.Tensor:
        return data[start : start + math.prod(shape)].view(shape)

    return (
        plane(0, rows, words, 4),
        plane(sizes.high, rows, words, kind.high_bits),
        plane(sizes.scales, rows, sizes.groups * kind.scale_bytes),
        plane(sizes.supers, rows, sizes.groups * kind.super_bytes // 2),
    )


def _packed(kind: PlaneFormat, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes u8 [rows, columns], whole groups of them, as bytes of words [rows, words, 4] and of their upper bits."""
    # block, half, lane, pair of columns, which of the pair
    codes = codes.view(len(codes), -1, 4, 2, 4, 2, 2)
    if kind.word_codes == 4:
        words = codes.permute(0, 1, 3, 4, 2, 6, 5).reshape(len(codes), -1, 4)
        return words, words[:, :, :0]
    fields = codes.permute(0, 1, 4, 2, 6, 3, 5).reshape(len(codes), -1, 8)
    words = fields[:, :, 0::2] & 15 | (fields[:, :, 1::2] & 15) << 4
    upper = fields >> 4
    per_byte = 8 // max(1, kind.high_bits)
    high = torch.zeros(*words.shape[:2], kind.high_bits, dtype=torch.uint8, device=codes.device)
    for index in range(8 if kind.high_bits else 0):
        high[:, :, index // per_byte] |= upper[:, :, index] << index % per_byte * kind.high_bits
    return words, high


def _unpacked(kind: PlaneFormat, words: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The inverse of ``_packed``: codes i32 [rows, columns]."""
    rows = len(words)
    if kind.word_codes == 4:
        codes = words.view(torch.int8).view(rows, -1, 2, 4, 4, 2, 2).permute(0, 1, 4, 2, 3, 6, 5)
        return codes.reshape(rows, -1).int()
    fields = torch.stack([words & 15, words >> 4], dim=-1).flatten(2)
    per_byte = 8 // max(1, kind.high_bits)
    for index in range(8 if kind.high_bits else 0):
        upper = high[:, :, index // per_byte] >> index % per_byte * kind.high_bits & (1 << kind.high_bits) - 1
        fields[:, :, index] |= upper << 4
    codes = fields.view(rows, -1, 4, 4, 2, 2, 2).permute(0, 1, 3, 5, 2, 6, 4)
    return codes.reshape(rows, -1).int()


def _levels(kind: PlaneFormat, words: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """What scales are multiplied with, f32 [rows, columns]."""
    codes = _unpacked(kind, words, high)
    if kind.scales == "group":
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
    return (codes - kind.offset).float()


def _scales_of(
    kind: PlaneFormat, scales: torch.Tensor, supers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """d and m of each block, of each half of one, or of each group of them, f32 [rows, blocks]; no m: 0."""
    if kind.scales == "group":
        return scales.view(torch.float32), None
    if kind.scales == "half":
        return scales.view(torch.float16).float(), None
    if kind.scales == "half_and_min":
        pairs = scales.view(torch.float16).float()
        return pairs[:, 0::2], pairs[:, 1::2]
    shared = supers.view(torch.float16).float()
    if kind.scales == "q6_k":
        return scales.view(torch.int8).float() * shared.repeat_interleave(16, 1), None
    d, dmin = shared[:, 0::2].repeat_interleave(8, 1), shared[:, 1::2].repeat_interleave(8, 1)
    return d * scales[:, 0::2].float(), -(dmin * scales[:, 1::2].float())


Read = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes u8 [rows, columns], scales and supers as bytes [rows, ...]."""


def _read_plain(source: torch.Tensor, block_bytes: int, scale_bytes: int, high_bytes: int) -> Read:
    """Blocks of scales, fifth bits, and codes, of which four bits of columns c and c + 16 lie in a byte."""
    blocks = source.view(len(source), -1, block_bytes)
    scales, codes = blocks[:, :, :scale_bytes], blocks[:, :, scale_bytes + high_bytes :]
    if codes.shape[2] == 16:
        codes = torch.cat([codes & 15, codes >> 4], dim=2)
    if high_bytes:
        bits = torch.arange(8, device=source.device)
        high = blocks[:, :, scale_bytes : scale_bytes + high_bytes, None] >> bits & 1
        codes = codes | high.flatten(2).to(torch.uint8) << 4
    return codes.flatten(1), scales.flatten(1), source[:, :0]


def _read_k(source: torch.Tensor, block_bytes: int, high_bytes: int) -> Read:
    """Blocks of 256: fp16 d and dmin, eight scales and minima of 6 bits, the fifth bits, a byte for columns c and
    c + 32 of each 64."""
    blocks = source.view(len(source), -1, block_bytes)
    packed, codes = blocks[:, :, 4:16], blocks[:, :, 16 + high_bytes :].unflatten(2, (4, 1, 32))
    low, middle, last = packed[:, :, 0:4], packed[:, :, 4:8], packed[:, :, 8:12]
    scales = torch.cat([low & 63, last & 15 | low >> 6 << 4], dim=2)
    minima = torch.cat([middle & 63, last >> 4 | middle >> 6 << 4], dim=2)
    codes = torch.cat([codes & 15, codes >> 4], dim=3).flatten(2, 3)  # [rows, blocks, 8, 32]
    if high_bytes:
        bits = torch.arange(8, device=source.device)[:, None]
        codes = codes | (blocks[:, :, None, 16:48] >> bits & 1).to(torch.uint8) << 4
    return codes.flatten(1), torch.stack([scales, minima], dim=3).flatten(1), blocks[:, :, :4].flatten(1)


def _read_q6_k(source: torch.Tensor) -> Read:
    """Blocks of 256: the lower four bits, the upper two, 16 scales, fp16 d; in each half, four runs of 32."""
    blocks = source.view(len(source), -1, 210)
    low, high = blocks[:, :, :128].unflatten(2, (2, 1, 64)), blocks[:, :, 128:192].unflatten(2, (2, 1, 32))
    low = torch.cat([low & 15, low >> 4], dim=3).view(*blocks.shape[:2], 2, 4, 32)
    upper = high >> torch.tensor([0, 2, 4, 6], device=source.device)[:, None] & 3
    codes = low | upper.to(torch.uint8) << 4
    return codes.flatten(1), blocks[:, :, 192:208].flatten(1), blocks[:, :, 208:].flatten(1)


_READERS: dict[str, Callable[[torch.Tensor], Read]] = {
    "q8_0": partial(_read_plain, block_bytes=34, scale_bytes=2, high_bytes=0),
    "q4_0": partial(_read_plain, block_bytes=18, scale_bytes=2, high_bytes=0),
    "q4_1": partial(_read_plain, block_bytes=20, scale_bytes=4, high_bytes=0),
    "q5_0": partial(_read_plain, block_bytes=22, scale_bytes=2, high_bytes=4),
    "q5_1": partial(_read_plain, block_bytes=24, scale_bytes=4, high_bytes=4),
    "q4_k": partial(_read_k, block_bytes=144, high_bytes=0),
    "q5_k": partial(_read_k, block_bytes=176, high_bytes=32),
    "q6_k": _read_q6_k,
    "f8_e4m3": partial(_read_plain, block_bytes=132, scale_bytes=4, high_bytes=0),
}
