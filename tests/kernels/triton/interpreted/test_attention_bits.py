"""A row's attention has the same bits whatever the size of the cache's blocks is and whoever shares the step."""

import pytest
import torch

from skipkernels.kernels.triton import TRITON
from skipkernels.program.reference import decode_attention
from skipkernels.program.table import Instruction, instruction
from tests.tolerances import assert_close

SEQUENCES, POSITIONS, HEADS, KV_HEADS, HEAD_DIM, SPLIT = 3, 100, 4, 2, 6, 16
ROWS = [(0, 99), (1, 40), (2, 7), (0, 63), (0, 64), (1, 0)]
"""Sequence and position; the last three are prompt rows."""


def attention(block_size: int, active: list[int], sliding_window: int) -> Instruction:
    """The same keys, values and queries in blocks of any size, which lie in another order for each."""
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, SEQUENCES, POSITIONS, KV_HEADS, HEAD_DIM, generator=generator).bfloat16()
    query = torch.randn(len(ROWS), HEADS, HEAD_DIM, generator=generator)
    table = -(-POSITIONS // block_size)
    blocks = torch.randperm(SEQUENCES * table, generator=generator).view(SEQUENCES, table)
    positions = torch.arange(POSITIONS)
    caches = []
    for entries in (keys, values):
        cache = torch.full((SEQUENCES * table, KV_HEADS, block_size, HEAD_DIM), float("nan"), dtype=torch.bfloat16)
        cache[blocks[:, positions // block_size], :, positions % block_size] = entries
        caches.append(cache)
    return instruction(
        "decode_attention",
        row_mask=torch.tensor([int(row in active) for row in range(len(ROWS))], dtype=torch.int32),
        query=query,
        k_cache=caches[0],
        v_cache=caches[1],
        block_table=blocks.to(torch.int32),
        row_sequence=torch.tensor([sequence for sequence, _ in ROWS], dtype=torch.int32),
        row_position=torch.tensor([position for _, position in ROWS], dtype=torch.int32),
        attn_partials=torch.full((len(ROWS), HEADS, -(-POSITIONS // SPLIT) + 1, HEAD_DIM + 2), float("nan")),
        attn_output=torch.zeros(len(ROWS), HEADS, HEAD_DIM),
        scaling=HEAD_DIM**-0.5,
        sliding_window=sliding_window,
        kv_split_size=SPLIT,
    )


@pytest.mark.parametrize("sliding_window", [0, 30])
def test_bits_do_not_depend_on_blocks_or_on_other_rows(sliding_window: int) -> None:
    everyone = list(range(len(ROWS)))
    expected = attention(16, everyone, sliding_window)
    TRITON["decode_attention"](expected)
    reference = attention(16, everyone, sliding_window)
    decode_attention(reference)
    output = expected.tensors["attn_output"]
    assert_close(output, reference.tensors["attn_output"], "fp32")
    for block_size, active in ((5, everyone), (64, everyone), (128, everyone), (16, [0, 4]), (32, [1, 2, 3, 5])):
        ins = attention(block_size, active, sliding_window)
        TRITON["decode_attention"](ins)
        assert torch.equal(ins.tensors["attn_output"][active], output[active]), f"blocks of {block_size}, {active}"
        idle = [row for row in everyone if row not in active]
        assert not ins.tensors["attn_output"][idle].any()
