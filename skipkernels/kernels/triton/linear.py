"""The matrix-vector products that decoding is made of: every weight is read once for all rows of a tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from skipkernels.kernels.triton.linear_blocks import block_products, plane_numbers
from skipkernels.model.matrix import Matrix, MatrixOperand
from skipkernels.model.planes import GROUP_COLUMNS, PLANE_FORMATS

STAGES = tl.constexpr(4)
"""Tiles of weights on their way from memory while one is multiplied."""


@triton.jit
def load_weights(weight, features, features_inside, columns, columns_inside, in_features: tl.constexpr):
    at = weight + features.to(tl.int64)[:, None] * in_features + columns[None, :]
    mask = features_inside[:, None] & columns_inside[None, :]
    return tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def linear(
    x,  # f32 [num_rows, in_features]
    norm,  # f32 [in_features], or None: x is taken as it is
    norm_eps,
    weight,  # [out_features, in_features], or the planes of blocks
    features,  # the rows of weight wanted here [BLOCK_OUT]
    features_inside,
    rows,
    wanted,
    in_features: tl.constexpr,
    planes: tl.constexpr,  # where those of blocks lie (``linear_blocks.plane_numbers``); None: weight holds floats
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """rms_norm(x) @ weight[features].T, f32 [BLOCK_ROWS, BLOCK_OUT]; rows that are not wanted are not read.

    The norm's factor is the same for all inputs of a row, so x is read once: its squares are summed alongside the
    products, which are scaled at the end.
    """
    # where BLOCK_IN divides in_features, the compiler is to know that no mask is needed
    DIVIDES: tl.constexpr = in_features % BLOCK_IN == 0
    if planes is not None:
        out, squares = block_products(
            x, norm, weight, features, features_inside, rows, wanted,
            in_features, planes, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
    elif BLOCK_ROWS == 1:
        squares = tl.zeros([BLOCK_IN], tl.float32)
        products = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
        for start in tl.range(0, in_features, BLOCK_IN, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK_IN)
            inside = (columns < in_features) | DIVIDES
            weights = load_weights(weight, features, features_inside, columns, inside, in_features)
            values = tl.load(x + columns, mask=inside, other=0.0)
            if norm is not None:
                squares += values * values
                values *= tl.load(norm + columns, mask=inside, other=0.0)
            products += weights * values[None, :]
        out = tl.sum(products, axis=1)[None, :]
    else:
        squares = tl.zeros([BLOCK_IN, BLOCK_ROWS], tl.float32)
        sums = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
        for start in tl.range(0, in_features, BLOCK_IN, num_stages=STAGES):
            columns = start + tl.arange(0, BLOCK_IN)
            inside = (columns < in_features) | DIVIDES
            weights = load_weights(weight, features, features_inside, columns, inside, in_features)
            at = x + rows[None, :] * in_features + columns[:, None]
            values = tl.load(at, mask=wanted[None, :] & inside[:, None], other=0.0)
            if norm is not None:
                squares += values * values
                values *= tl.load(norm + columns, mask=inside, other=0.0)[:, None]
            # three products of tf32 halves: fp32 but for the last bits, and bf16 or fp16 weights exactly
            sums = tl.dot(weights, values, sums, input_precision="tf32x3")
        out = tl.trans(sums)
    if norm is not None:
        mean_square = tl.sum(squares, axis=0) / in_features
        out *= tl.rsqrt(tl.expand_dims(mean_square + norm_eps, -1))
    return out


@dataclass(frozen=True)
class Tile:
    """How a program of ``linear`` cuts its matrix: ``out`` rows, of which it reads ``columns`` at a time."""

    out: int
    columns: int


def tile(weight: torch.Tensor | Matrix, num_rows: int, *, unit: int = 1) -> Tile:
    """The tile for a matrix [out, in]; ``unit`` (a power of two) rows stay in one program.

    Large tiles read the activations less often, small ones leave no multiprocessor of a GPU idle: so a tile is halved
    while there are fewer programs than the hundred-odd multiprocessors can hold at once (a single row), or
    than there are (more rows, whose programs keep more on its way).
    """
    out_features, in_features = weight.shape
    largest, smallest, programs = (16, 4, 512) if num_rows == 1 else (32, 16, 128)
    out = largest
    while out > smallest and out_features < out * programs:
        out //= 2
    out = max(out, unit)
    if isinstance(weight, torch.Tensor):
        # one row: 16 KB of weights, 64 products a thread; more: 128 bytes of each row, or tf32 halves would spill
        size = weight.element_size()
        columns = 16384 // (out * size) if num_rows == 1 else 128 // size
        return Tile(out, max(16, min(columns, triton.next_power_of_2(in_features))))
    # one row: 8 KB of words, 16 a thread; more: 64 bytes of each matrix row, which tensor cores take for every code
    words = 2048 // out if num_rows == 1 else 16
    columns = words * PLANE_FORMATS[weight.format].word_codes
    return Tile(out, max(GROUP_COLUMNS, min(columns, triton.next_power_of_2(in_features))))


def operand(name: str, matrix: MatrixOperand, planes_name: str = "planes") -> dict[str, Any]:
    """A matrix of floats, or one part of blocks, as kernels take it: its memory, and where its planes lie."""
    if isinstance(matrix, torch.Tensor):
        return {name: matrix, planes_name: None}
    assert isinstance(matrix, Matrix)
    return {name: matrix.data.view(torch.int32), planes_name: plane_numbers(matrix)}
