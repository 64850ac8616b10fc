"""Keys and values are rounded into the cache as torch rounds: to nearest, ties to even, bit by bit."""

import math

import pytest
import torch

from skipkernels.program.table import instruction
from tests.program.native import run_natively

SPECIAL = [
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    65504.0,
    65519.9,
    65520.0,
    1e30,
    3.4e38,
    6e-8,
    2.9e-8,
    6.1e-5,
    1e-40,
]
HEAD_DIM = 2048


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_cache_holds_what_torch_rounds_to(dtype: torch.dtype) -> None:
    """With weights of zero the bias is the value, exactly."""
    bits = torch.randint(-(2**31), 2**31, (HEAD_DIM,), generator=torch.Generator().manual_seed(0))
    ties = torch.arange(256) * 2.0**-9 + 1  # halfway between neighbours in bf16, every other one
    half_ties = torch.arange(256) * 2.0**-11 + 1
    subnormal = torch.arange(256) * 2.0**-25
    chosen = torch.cat((torch.tensor(SPECIAL), ties, half_ties, subnormal, -ties, -subnormal))
    value = bits.to(torch.int32).view(torch.float32).clone()
    value[: len(chosen)] = chosen
    cache = torch.zeros(2, 1, 16, HEAD_DIM, dtype=dtype)
    ins = instruction(
        "qkv_rope_append",
        row_mask=torch.ones(1, dtype=torch.int32),
        hidden_states=torch.ones(1, 1),
        input_layernorm=torch.ones(1),
        qkv_proj=torch.zeros(3 * HEAD_DIM, 1, dtype=dtype),
        qkv_bias=torch.cat((torch.zeros(2 * HEAD_DIM), value)),
        rope_cos=torch.ones(2, HEAD_DIM // 2),
        rope_sin=torch.zeros(2, HEAD_DIM // 2),
        query=torch.zeros(1, 1, HEAD_DIM),
        k_cache=torch.zeros_like(cache),
        v_cache=cache,
        block_table=torch.ones(1, 1, dtype=torch.int32),
        row_sequence=torch.zeros(1, dtype=torch.int32),
        row_position=torch.zeros(1, dtype=torch.int32),
        rms_norm_eps=1e-5,
    )
    run_natively(ins, dtype)
    expected, actual = value.to(dtype), cache[1, 0, 0]
    assert torch.equal(actual.isnan(), expected.isnan())
    whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    numbers = ~expected.isnan() & (expected != 0)  # -0 plus a product of zero is +0
    assert torch.equal(actual[numbers].view(whole), expected[numbers].view(whole))
    assert (actual[expected == 0] == 0).all()
