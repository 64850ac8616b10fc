"""How large the paged KV cache is."""

from __future__ import annotations

import logging

import torch

from skipkernels.errors import DeviceError, RequestError
from skipkernels.model.config import ModelConfig
from skipkernels.program.state import LAYOUTS
from skipkernels.support.memory import free_memory_bytes

logger = logging.getLogger(__name__)

CACHE_SHARE = 0.5
"""Of the memory that is free once the weights are there: the most that the cache takes without being told."""


def cache_blocks(
    config: ModelConfig, dtype: torch.dtype, device: str, sequences: int, max_seq_len: int, cache_bytes: int | None
) -> int:
    """Blocks for ``sequences`` of up to ``max_seq_len`` positions: as many as fit ``cache_bytes``, of which those that
    no sequence needs keep prompts; or (None) as all of them could need, within ``CACHE_SHARE`` of the free memory.

    Raises:
        RequestError: that is less than one sequence may need.
    """
    block_size = LAYOUTS[torch.device(device).type].block_size
    block_bytes = config.cache_bytes(1, block_size, dtype)
    one = -(-max_seq_len // block_size)
    wanted = sequences * one
    if cache_bytes is None:
        free = free_memory_bytes(device)
        limit, what = int(CACHE_SHARE * free), f"{CACHE_SHARE:.0%} of the {free:,} bytes that are free on {device}"
    else:
        limit, what = cache_bytes, f"cache_bytes={cache_bytes:,}"
    blocks = limit // block_bytes if cache_bytes is not None else min(wanted, limit // block_bytes)
    if blocks < one:
        raise RequestError(
            f"the cache of one sequence of max_seq_len={max_seq_len} needs {one * block_bytes:,} bytes, {what} is "
            "less; use a smaller max_seq_len or a larger cache_bytes"
        )
    logger.info(
        "cache: %d blocks of %d positions, %.1f MB, for %d sequences of up to %d positions%s",
        blocks,
        block_size,
        blocks * block_bytes / 1e6,
        sequences,
        max_seq_len,
        "" if blocks == wanted else f" ({what}; all of them at full length need {wanted} blocks)",
    )
    return blocks


def check_memory(config: ModelConfig, dtype: torch.dtype, max_seq_len: int, device: str) -> None:
    """Refuses a model that does not fit a GPU before a byte of it is read.

    Raises:
        DeviceError: the weights and the cache of one sequence need more memory than is free.
    """
    if not device.startswith("cuda"):
        return
    weights, cache = config.weight_bytes(dtype), config.cache_bytes(1, max_seq_len, dtype)
    free, total = torch.cuda.mem_get_info(torch.device(device))
    if weights + cache > free:
        gib = 2**30
        raise DeviceError(
            f"the model needs {(weights + cache) / gib:.1f} GiB ({weights / gib:.1f} of weights, {cache / gib:.1f} of "
            f"cache for a sequence of {max_seq_len} positions), and {device} has {free / gib:.1f} GiB free of "
            f"{total / gib:.1f}; use a smaller max_seq_len or dtype"
        )
