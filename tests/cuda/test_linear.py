"""The matrix kernels: every way through them, at the edges of tiles, loads and blocks."""

from __future__ import annotations

import pytest
import torch

from skipkernels.program.table import instruction
from tests.cuda.comparison import case, compare_op, run_with_kernels

PROJECTIONS = ["qkv_rope_append", "o_proj_add", "gate_up_act", "down_proj_add", "lm_head"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("batch_size", [1, 3, 11])  # one row, one and two columns of tensor core tiles
@pytest.mark.parametrize(
    ("columns", "num_sms"),
    [
        (8, 2),  # one lane works
        (520, 1),  # a last block of columns that is not full; several tiles a block
        (2056, 40),  # columns of a second and third round; most blocks have one tile, or none
        (1001, 2),  # odd: no 16-byte loads
    ],
)
def test_inner_sizes(columns: int, num_sms: int, batch_size: int, dtype: torch.dtype) -> None:
    program = case(seq_lens=(5,) * batch_size, intermediate_size=columns, hidden_size=24, dtype=dtype, seed=columns)
    compare_op("down_proj_add", program, num_sms=num_sms, seed=batch_size)


@dtypes
@pytest.mark.parametrize("batch_size", [1, 5, 16])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 17, 65])  # of a tile of 16, and of its runs of 8
def test_edges_of_tiles(rows: int, batch_size: int, dtype: torch.dtype) -> None:
    """Outputs on both sides of a projection: an odd hidden_size makes its own loads scalar, an odd vocabulary not."""
    program = case(seq_lens=(5,) * batch_size, vocab_size=max(2, rows), intermediate_size=rows, dtype=dtype, seed=rows)
    for op in ("gate_up_act", "lm_head"):
        compare_op(op, program, seed=rows)
    compare_op("down_proj_add", case(seq_lens=(5,) * batch_size, hidden_size=rows, dtype=dtype, seed=rows))


@dtypes
@pytest.mark.parametrize("batch_size", [1, 2, 9])
@pytest.mark.parametrize("head_dim", [2, 6, 16, 40, 80])  # halves of 1 and 3 channels, 1, 2.5 and 5 runs
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_heads(qk_norm: bool, head_dim: int, batch_size: int, dtype: torch.dtype) -> None:
    lengths = tuple(3 * row for row in range(batch_size))
    program = case(seq_lens=lengths, head_dim=head_dim, qk_norm=qk_norm, qkv_bias=True, dtype=dtype)
    compare_op("qkv_rope_append", program, seed=head_dim)


@dtypes
@pytest.mark.parametrize("op", PROJECTIONS)
@pytest.mark.parametrize("active", [(False, True, False), (True, True, False), (False,) * 3])
def test_rows_that_are_not_wanted(active: tuple[bool, ...], op: str, dtype: torch.dtype) -> None:
    """Of three rows one, two and none: the first takes the way of a single row, the last touches no weight."""
    compare_op(op, case(seq_lens=(5,) * 3, active=active, dtype=dtype, qkv_bias=True, o_proj_bias=True))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5])  # the last: beyond fp16, as massive activations are
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_keep_the_accuracy_of_floats(dtype: torch.dtype, scale: float) -> None:
    """A row's result, computed with others on the tensor cores, against a product in fp64."""
    generator = torch.Generator().manual_seed(3)
    rows, columns, channels = 4, 1024, 32
    weights = (torch.randn(channels, columns, generator=generator) / 32).to(dtype)
    x = torch.randn(rows, columns, generator=generator) * scale
    hidden = torch.zeros(rows, channels)
    ins = instruction(
        "down_proj_add",
        row_mask=torch.ones(rows, dtype=torch.int32),
        intermediate=x,
        down_proj=weights,
        hidden_states=hidden,
        similarity_partials=None,
        rows_per_partial=16,
    )
    run_with_kernels(ins)
    exact = x.double() @ weights.double().T
    error = float((hidden.double() - exact).abs().max() / (x.abs().double() @ weights.abs().double().T).max())
    assert error < 2**-22  # two fp16 hold 22 bits of a float, three bf16 hold 24; one alone would be off by 1e-5
