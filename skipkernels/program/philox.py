"""Philox4x32-10 (Salmon et al., SC 2011), the counter-based generator behind ``sample`` and the random baseline.

Stateless: a number is a function of (key, counter), so every executor draws the same one in any order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

SAMPLE_STREAM = 0
GATE_STREAM = 1

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox_uniform(seed: int, index: npt.ArrayLike, step: int, stream: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in (0, 1), one for each ``index``: lane ``index % 4`` of the block at counter
    (index // 4, step, stream, 0) under the 64-bit key ``seed``."""
    lanes = np.asarray(index, dtype=np.uint64)
    counter = [lanes // np.uint64(4), np.full_like(lanes, step), np.full_like(lanes, stream), np.zeros_like(lanes)]
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)]
    for _ in range(10):
        product0 = counter[0] * _MULTIPLIERS[0]
        product1 = counter[2] * _MULTIPLIERS[1]
        counter = [
            (product1 >> _SHIFT) ^ counter[1] ^ key[0],
            product1 & _MASK,
            (product0 >> _SHIFT) ^ counter[3] ^ key[1],
            product0 & _MASK,
        ]
        key = [(key[0] + _WEYL[0]) & _MASK, (key[1] + _WEYL[1]) & _MASK]
    bits = np.choose((lanes % np.uint64(4)).astype(np.int64), counter)
    return ((bits >> np.uint64(8)).astype(np.float64) + 0.5) / (1 << 24)
