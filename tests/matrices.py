"""Random matrices of blocks: any byte is a block, and scales are drawn so that weights are like a model's."""

import numpy as np
import torch

from skipkernels.model.matrix import BLOCK_FORMATS, Matrix

_SCALES = {"q8_0": [0], "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q4_k": [0, 2], "q5_k": [0, 2]}
"""Q6_K's is its last."""


def scale_offsets(format: str) -> list[int]:
    """Where the fp16 numbers of a block of GGUF's begin, in bytes."""
    return _SCALES.get(format, [BLOCK_FORMATS[format].block_bytes - 2])


def random_matrix(format: str, rows: int, columns: int, *, seed: int = 0, scale: float = 0.01) -> Matrix:
    """Every byte random but for the scales, which are normal with a deviation of ``scale``, and NaN."""
    block = BLOCK_FORMATS[format]
    generator = np.random.default_rng(seed)
    count = columns // block.block_columns
    data = generator.integers(0, 256, (rows, count, block.block_bytes), dtype=np.uint8)
    if format == "f8_e4m3":
        drawn = (generator.standard_normal((rows, count, 1)) * scale).astype(np.float32)
        data[data & 0x7F == 0x7F] -= 1
        data[:, :, :4] = drawn.view(np.uint8)
        return Matrix(format, rows, columns, torch.from_numpy(data.reshape(rows, -1)))
    for at in scale_offsets(format):
        drawn = (generator.standard_normal((rows, count, 1)) * scale).astype(np.float16)
        data[:, :, at : at + 2] = drawn.view(np.uint8)
    return Matrix(format, rows, columns, torch.from_numpy(data.reshape(rows, -1)))


def every_number() -> torch.Tensor:
    """The bits of all 254 numbers of e4m3 that are no NaN, zero twice more, u8 [256]."""
    bits = torch.arange(256, dtype=torch.uint8)
    return torch.where(bits & 0x7F == 0x7F, 0, bits).to(torch.uint8)
