"""decode_attention: splits, runs of splits and their merge, groups of every size, all ways to read the cache."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.comparison import case, compare_op

RUNS = 32  # of a row at most; kMaxRuns
SPLIT = 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 6, 7, 8, 11])
def test_groups(group_size: int, dtype: torch.dtype) -> None:
    program = case(seq_lens=(70, 3), group_size=group_size, dtype=dtype)
    compare_op("decode_attention", program, seed=group_size % 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [2, 10, 64, 80, 96, 128, 136, 256])  # odd loads, copied heads, larger ones
def test_heads(head_dim: int, dtype: torch.dtype) -> None:
    compare_op("decode_attention", case(seq_lens=(130,), head_dim=head_dim, group_size=3, dtype=dtype), num_sms=2)


@pytest.mark.parametrize("seq_len", [0, 1, SPLIT - 2, SPLIT - 1, SPLIT, 2 * SPLIT - 1, 2 * SPLIT])
def test_lengths_around_a_split(seq_len: int) -> None:
    compare_op("decode_attention", case(seq_lens=(seq_len,)))


@pytest.mark.parametrize("num_sms", [1, 2, 9])
@pytest.mark.parametrize("seq_len", [RUNS * SPLIT - 1, RUNS * SPLIT, 3 * RUNS * SPLIT - 40])
def test_runs_of_several_splits(seq_len: int, num_sms: int) -> None:
    """Rows of one run, of many, and one that is idle, which must not be read."""
    program = case(seq_lens=(seq_len, 40, seq_len - 300), active=(True, True, False), num_key_value_heads=1)
    compare_op("decode_attention", program, num_sms=num_sms, seed=num_sms)


@pytest.mark.parametrize("window", [1, 7, SPLIT, SPLIT + 1, 3 * SPLIT, RUNS * SPLIT + 9])
def test_windows(window: int) -> None:
    program = case(seq_lens=(RUNS * SPLIT + 75, 130), sliding_window=window, num_layers=2)
    compare_op("decode_attention", program, num_sms=2)
