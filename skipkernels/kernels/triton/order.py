"""Scores as integers that order as they do, so that equal scores, infinities and NaN have a place in it."""

from __future__ import annotations

import triton
import triton.language as tl

NO_RANK = tl.constexpr(-(1 << 63))
"""Less than any ``ranked``."""


@triton.jit
def order_key(score):
    """i64 in 0 .. 2^32 - 1, rising with the fp32 score: equal for -0 and 0, the largest for NaN."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score != score, 0x7FFFFFFF, key).to(tl.int64) + 0x80000000


@triton.jit
def ranked(score, token):
    """i64 whose maximum belongs to the largest score, the first of equals and of NaN: torch's argmax."""
    return ((order_key(score) - 0x80000000) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def ranked_token(rank):
    return 0x7FFFFFFF - (rank & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def ranked_score(rank):
    key = (rank >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
