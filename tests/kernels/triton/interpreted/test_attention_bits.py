"""A row's attention has the same bits whatever the size of the cache's blocks is and whoever shares the step."""

import pytest
import torch

from skipkernels.kernels.triton import TRITON
from skipkernels.program.reference import decode_attention
from tests.executors.attention_case import AttentionCase
from tests.tolerances import assert_close

ROWS = ((0, 99), (1, 40), (2, 7), (0, 63), (0, 64), (1, 0))
"""Sequence and position; the last three are prompt rows."""
attention = AttentionCase(ROWS, positions=100, heads=4, kv_heads=2, head_dim=6, kv_split_size=16).instruction


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
