"""From floats to GGUF's blocks: by the ``gguf`` package, and for the K formats, which it only reads, by a search.

A K format holds super-blocks of 256 weights: scales of sub-blocks, themselves quantised under one or two fp16 numbers.
For every sub-block several scales around the one that spans its values are tried, and the one with the least squared
error is taken, with large weights counting for more; then scales are quantised, and weights once more under those.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import torch

from skipkernels.errors import ModelError
from skipkernels.model.matrix import BLOCK_FORMATS, Matrix

_CHUNK = 1 << 20
"""Weights quantised at a time: 4 MB of floats, and a few times that for what is tried."""
_TRIES = 9
"""Scales tried above and below the one that spans a sub-block; the steps are a tenth of a level."""


def quantize(values: torch.Tensor, format: str) -> Matrix:
    """``values`` f32 [rows, columns] in blocks of ``format``, one of ``WRITABLE_FORMATS``.

    Raises:
        ModelError: there is no quantiser for the format, or the columns are no whole number of its blocks.
    """
    if format not in WRITABLE_FORMATS:
        raise ModelError(f"{format!r} cannot be written; these formats can: {', '.join(WRITABLE_FORMATS)}")
    rows, columns = values.shape
    size = BLOCK_FORMATS[format].block_columns
    if columns % size:
        raise ModelError(f"{format} needs a multiple of {size} columns, got {columns}")
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise ModelError(f"NaN or infinite values cannot be held by {format}")
    out = torch.empty(rows, BLOCK_FORMATS[format].row_bytes(columns), dtype=torch.uint8)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        chunk = values[start : start + step].float()
        out[start : start + step] = _QUANTIZERS[format](chunk).reshape(len(chunk), -1)
    return Matrix(format, rows, columns, out)


def _by_package(format: str) -> Callable[[torch.Tensor], torch.Tensor]:
    kind = gguf.GGMLQuantizationType[format.upper()]
    return lambda rows: torch.from_numpy(gguf.quantize(rows.numpy(), kind))


def _q6_k(rows: torch.Tensor) -> torch.Tensor:
    """f32 [rows, columns] -> u8 [blocks, 210]: 16 sub-blocks, weights d * scale * q with q in -32..31."""
    parts = rows.reshape(-1, 16, 16)
    scales = _symmetric_scales(parts, 32)
    largest = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    d = (largest / -128).half()
    own = d.float()
    levels = torch.round(_divided(scales, own)).clamp(-128, 127)
    q = torch.round(_divided(parts, (own * levels)[..., None])).clamp(-32, 31) + 32
    q = q.to(torch.uint8).view(-1, 2, 4, 32)  # of each half: four runs of 32
    low = torch.stack([q[:, :, 0] & 15 | (q[:, :, 2] & 15) << 4, q[:, :, 1] & 15 | (q[:, :, 3] & 15) << 4], 2)
    high = q >> 4
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return torch.cat([low.flatten(1), high.flatten(1), levels.to(torch.int8).view(torch.uint8), _bytes(d)], 1)


def _symmetric_scales(parts: torch.Tensor, half: int) -> torch.Tensor:
    """f32 [..., n] -> [...]: the scale of each part with the least error, weighted by the values' squares, for whole
    numbers from -half to half - 1."""
    extreme = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))
    weights = parts * parts
    best_scale, best_gain = torch.zeros_like(extreme[..., 0]), torch.zeros_like(extreme[..., 0])
    for trial in range(-_TRIES, _TRIES + 1):
        q = torch.round(_divided(parts, extreme / -(half + 0.1 * trial))).clamp(-half, half - 1)
        cross, square = (weights * parts * q).sum(-1), (weights * q * q).sum(-1)
        gain = _divided(cross * cross, square)  # by how much the error is less than that of zeros
        better = gain > best_gain
        best_scale = torch.where(better, _divided(cross, square), best_scale)
        best_gain = torch.where(better, gain, best_gain)
    return best_scale


def _q4_k(rows: torch.Tensor) -> torch.Tensor:
    """f32 [rows, columns] -> u8 [blocks, 144]: 8 sub-blocks, weights d * scale * q - dmin * minimum, q in 0..15."""
    parts = rows.reshape(-1, 8, 32)
    scales, minima = _scales_and_minima(parts)
    d, dmin = ((of.amax(1, keepdim=True) / 63).half() for of in (scales, minima))
    levels = torch.round(_divided(scales, d.float())).clamp(0, 63)
    depths = torch.round(_divided(minima, dmin.float())).clamp(0, 63)
    steps = (d.float() * levels)[..., None]
    q = torch.round(_divided(parts + (dmin.float() * depths)[..., None], steps)).clamp(0, 15)
    pairs = q.to(torch.uint8).view(-1, 4, 2, 32)
    sc, m = levels.to(torch.uint8), depths.to(torch.uint8)
    packed = [sc[:, :4] | (sc[:, 4:] >> 4) << 6, m[:, :4] | (m[:, 4:] >> 4) << 6, sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4]
    return torch.cat([_bytes(d), _bytes(dmin), *packed, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)], 1)


def _scales_and_minima(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [..., n] -> scales and minima [...], both at least 0: values near scale * q - minimum, q in 0..15."""
    low, high = parts.amin(-1, keepdim=True).clamp(max=0), parts.amax(-1, keepdim=True)
    weights = parts.square().mean(-1, keepdim=True).sqrt() + parts.abs()
    total, mean = weights.sum(-1, keepdim=True), (weights * parts).sum(-1, keepdim=True)
    best_scale, best_minimum = (high - low) / 15, -low
    best_error = torch.full_like(low, torch.inf)
    for trial in range(-_TRIES, _TRIES + 1):
        q = torch.round(_divided(parts - low, (high - low) / (15 + 0.1 * trial))).clamp(0, 15)
        first, second = (weights * q).sum(-1, keepdim=True), (weights * q * q).sum(-1, keepdim=True)
        cross = (weights * q * parts).sum(-1, keepdim=True)
        spread = total * second - first * first
        scale = _divided(total * cross - mean * first, spread)  # the line of least squares through q and the values
        minimum = _divided(first * cross - second * mean, spread)
        below = minimum < 0  # which no block can hold
        scale = torch.where(below, _divided(cross, second), scale)
        minimum = minimum.clamp(min=0)
        error = (weights * (scale * q - minimum - parts).square()).sum(-1, keepdim=True)
        better = (error < best_error) & (scale > 0)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
        best_error = torch.where(better, error, best_error)
    return best_scale[..., 0].clamp(min=0), best_minimum[..., 0].clamp(min=0)


def _divided(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """0 where divided by 0: a block of zeros has no scale."""
    return torch.where(by == 0, 0.0, values / by)


def _bytes(halves: torch.Tensor) -> torch.Tensor:
    """fp16 [n, 1] -> u8 [n, 2]."""
    return halves.contiguous().view(torch.uint8)


_QUANTIZERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{format: _by_package(format) for format in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")},
    "q4_k": _q4_k,
    "q6_k": _q6_k,
}
WRITABLE_FORMATS = tuple(_QUANTIZERS)
"""The block formats that floats can be quantised to; q5_k and the smaller K formats are only read."""
