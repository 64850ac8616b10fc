"""The matrix kernels: a row gets the bits it gets alone, whatever number of rows shares the step."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels import _C
from skipkernels.program.table import instruction
from tests.executors.native_rows import run
from tests.executors.programs import guarded, same_bits
from tests.tolerances import assert_close

ISAS = pytest.mark.parametrize("isa", _C.usable_isas())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def gate_up(x: torch.Tensor, weights: torch.Tensor, isa: str, rows: list[int] | None = None) -> torch.Tensor:
    """intermediate [rows, intermediate] of x [rows, hidden], for the rows of the list (None: all)."""
    row_mask = torch.zeros(len(x), dtype=torch.int32)
    row_mask[slice(None) if rows is None else rows] = 1
    out = torch.zeros(len(x), weights.shape[0] // 2)
    operands = {"hidden_states": guarded(x), "gate_up_proj": guarded(weights), "intermediate": out}
    operands["post_attention_layernorm"] = torch.linspace(0.5, 1.5, x.shape[1])
    run(
        instruction("gate_up_act", row_mask=row_mask, rms_norm_eps=1e-5, activation=0, **operands),
        weights.dtype,
        isa,
    )
    return out


def draw(hidden: int, intermediate: int, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(hidden)
    weights = torch.randn(2 * intermediate, hidden, generator=generator) / hidden**0.5
    return torch.randn(rows, hidden, generator=generator), weights.to(dtype)


@ISAS
@DTYPES
@pytest.mark.parametrize("hidden", [33, 576, 2100])
def test_a_row_alone_gets_the_bits_it_gets_among_others(isa: str, dtype: torch.dtype, hidden: int) -> None:
    x, weights = draw(hidden, 53, 256, dtype)
    alone = torch.cat([gate_up(x[row : row + 1], weights, isa) for row in range(0, 256, 51)])
    for rows in (7, 100, 256):
        together = gate_up(x[:rows], weights, isa)
        for index, row in enumerate(range(0, rows, 51)):
            assert same_bits(together[row], alone[index]), f"row {row} of {rows}"


@ISAS
@given(data=st.data())
@settings(max_examples=25)
def test_any_rows_of_any_list_get_their_own_bits(isa: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x, weights = draw(data.draw(st.integers(1, 150)), 31, 40, dtype)
    expected = gate_up(x, weights, isa)
    rows = sorted(data.draw(st.sets(st.integers(0, 39), min_size=1)))
    actual = gate_up(x, weights, isa, rows)
    assert same_bits(actual[rows], expected[rows])
    others = [row for row in range(40) if row not in rows]
    assert not actual[others].any()


@pytest.mark.skipif("avx512_bf16" not in _C.usable_isas(), reason="this processor has no bf16 dot products")
@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("intermediate", [1, 31, 32, 576, 2500])
def test_bf16_dot_products_are_those_of_rounded_activations(rows: int, intermediate: int) -> None:
    generator = torch.Generator().manual_seed(intermediate)
    x = torch.randn(rows, intermediate, generator=generator)
    down_proj = (torch.randn(50, intermediate, generator=generator) / intermediate**0.5).bfloat16()
    hidden_states = torch.zeros(rows, 50)
    row_mask = torch.ones(rows, dtype=torch.int32)
    operands = {"intermediate": guarded(x), "down_proj": guarded(down_proj), "hidden_states": hidden_states}
    run(
        instruction("down_proj_add", row_mask=row_mask, similarity_partials=None, rows_per_partial=24, **operands),
        torch.bfloat16,
        "avx512_bf16",
    )
    expected = x.bfloat16().double() @ down_proj.double().T
    assert_close(hidden_states, expected, "fp32")
    assert not torch.allclose(hidden_states.double(), x.double() @ down_proj.double().T, rtol=1e-5, atol=1e-6)
