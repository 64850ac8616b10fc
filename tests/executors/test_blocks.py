"""Quantised matrices in the C++ kernels: unpacked bit for bit, multiplied as the reference does, on every instruction
set; a row gets the bits it gets alone."""

from typing import Any

import numpy as np
import pytest
import torch

from skipkernels import _C
from skipkernels.errors import DeviceError
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.model.matrix import GGUF_FORMATS, AnyMatrix, Matrix, StackedMatrix
from skipkernels.program.reference import REFERENCE
from skipkernels.program.table import Instruction, instruction
from tests.executors.native_rows import Rows
from tests.executors.programs import guarded, same_bits
from tests.matrices import random_matrix, scale_offsets
from tests.tolerances import assert_close

ISAS = pytest.mark.parametrize("isa", _C.usable_isas())
FORMATS = pytest.mark.parametrize("format", GGUF_FORMATS)


@FORMATS
@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("threads", [1, 3])
def test_interleaved_weights_are_bit_for_bit_those_of_the_gguf_package(format: str, rows: int, threads: int) -> None:
    matrix = random_matrix(format, rows, 768, seed=rows)
    interleaved = matrix.interleaved(threads)
    np.testing.assert_array_equal(
        interleaved.dequantize().numpy().view(np.uint32), matrix.dequantize().numpy().view(np.uint32)
    )
    some = torch.tensor([rows - 1, 0])
    assert same_bits(interleaved.dequantize_rows(some), matrix.dequantize_rows(some))


def o_proj(matrix: AnyMatrix, x: torch.Tensor, hidden: torch.Tensor, **changes: Any) -> Instruction:
    operands = {
        "row_mask": torch.ones(len(x), dtype=torch.int32),
        "attn_output": guarded(x)[:, None],
        "o_proj": matrix,
        "o_proj_bias": None,
        "hidden_states": hidden,
    }
    return instruction("o_proj_add", **{**operands, **changes})


def run(ins: Instruction, isa: str = "auto", num_threads: int = 2) -> None:
    CpuExecutor((ins,), Rows(ins.row_mask, torch.float32), num_threads=num_threads, isa=isa).run_instruction(0)  # type: ignore[arg-type]


def product(matrix: Matrix, x: torch.Tensor, isa: str, num_threads: int = 2, **changes: Any) -> torch.Tensor:
    out = torch.zeros(len(x), matrix.rows)
    run(o_proj(matrix.interleaved(), x, out, **changes), isa, num_threads)
    return out


def expected_product(matrix: Matrix, x: torch.Tensor, **changes: Any) -> torch.Tensor:
    out = torch.zeros(len(x), matrix.rows)
    REFERENCE["o_proj_add"](o_proj(matrix, x, out, **changes))
    return out


def activations(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@ISAS
@FORMATS
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 33])
def test_products_are_those_of_int8_activations_and_exact_weights(isa: str, format: str, rows: int) -> None:
    matrix = random_matrix(format, 53, 512, seed=rows)
    x = activations(rows, 512)
    assert_close(product(matrix, x, isa), expected_product(matrix, x), "fp32")
    assert not torch.allclose(product(matrix, x, isa), x @ matrix.dequantize().T, rtol=1e-5, atol=1e-5)


@ISAS
@FORMATS
@pytest.mark.parametrize("columns", [256, 768])
def test_a_row_alone_gets_the_bits_it_gets_among_others(isa: str, format: str, columns: int) -> None:
    matrix, x = random_matrix(format, 61, columns), activations(100, columns)
    alone = [product(matrix, x[row : row + 1], isa, num_threads=1)[0] for row in range(0, 100, 13)]
    for rows in (7, 100):
        together = product(matrix, x[:rows], isa, num_threads=3)
        for index, row in enumerate(range(0, rows, 13)):
            assert same_bits(together[row], alone[index]), f"row {row} of {rows}"


def with_scales(format: str, data: torch.Tensor, bits: int) -> Matrix:
    blocks = data.view(17, -1, GGUF_FORMATS[format].block_bytes)
    for at in scale_offsets(format):
        blocks[:, :, at], blocks[:, :, at + 1] = bits & 255, bits >> 8
    return Matrix(format, 17, 512, data)


HALVES = {"zero": 0x0000, "subnormal": 0x0001, "negative": 0xBC00, "largest": 0x7BFF}


@ISAS
@FORMATS
@pytest.mark.parametrize("code", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("scale", HALVES)
@pytest.mark.parametrize("x", [127.0, -1.0, 0.0])
def test_extreme_blocks_neither_overflow_nor_lose_their_sign(
    isa: str, format: str, code: int, scale: str, x: float
) -> None:
    """All codes and all activations at their limits: the sums of products are the largest there are."""
    data = torch.full((17, GGUF_FORMATS[format].row_bytes(512)), code, dtype=torch.uint8)
    matrix = with_scales(format, data, HALVES[scale])
    rows = torch.full((5, 512), x)
    rows[1::2, ::2] *= -1
    assert_close(product(matrix, rows, isa), expected_product(matrix, rows), "fp32")


@ISAS
def test_activations_at_rounding_edges_are_the_references(isa: str) -> None:
    """Halves between two integers go to the even one; a block of tiny values is zero."""
    x = torch.arange(-127, 128).float().repeat(2)[:480] + 0.5
    x[32 * torch.arange(15)] = 127.0
    x = torch.cat((x, torch.full((32,), 1e-38)))[None]
    matrix = random_matrix("q8_0", 32, 512)
    assert_close(product(matrix, x, isa), expected_product(matrix, x), "fp32")


def gate_up(matrix: AnyMatrix, x: torch.Tensor, intermediate: torch.Tensor) -> Instruction:
    return instruction(
        "gate_up_act",
        row_mask=torch.ones(len(x), dtype=torch.int32),
        hidden_states=guarded(x),
        post_attention_layernorm=torch.linspace(0.5, 1.5, x.shape[1]),
        gate_up_proj=matrix,
        intermediate=intermediate,
        rms_norm_eps=1e-5,
        activation=0,
    )


@ISAS
@pytest.mark.parametrize("rows", [1, 20])
def test_gate_and_up_may_have_different_formats(isa: str, rows: int) -> None:
    """And sizes that are no whole number of groups or panels."""
    stack = StackedMatrix((random_matrix("q4_k", 75, 256), random_matrix("q6_k", 75, 256, seed=1)))
    x = activations(rows, 256)
    actual, expected = torch.zeros(rows, 75), torch.zeros(rows, 75)
    run(gate_up(stack.interleaved(), x, actual), isa)
    REFERENCE["gate_up_act"](gate_up(stack, x, expected))
    assert_close(actual, expected, "int8 activations")


def test_what_the_cpu_executor_does_not_compute_is_refused_by_name() -> None:
    matrix, x = random_matrix("q4_0", 3, 32), activations(1, 32)
    with pytest.raises(DeviceError, match="needs o_proj of o_proj_add in layout interleaved, got rows"):
        run(o_proj(matrix, x, torch.zeros(1, 3)))
    with pytest.raises(DeviceError, match="multiplies o_proj in q4_0 with int8 activations, not fp32"):
        run(o_proj(matrix.interleaved(), x, torch.zeros(1, 3), activations="fp32"))
    floats = random_matrix("f8_e4m3", 3, 128)
    with pytest.raises(DeviceError, match=r"cpu executor has no kernel for o_proj in f8_e4m3; it takes f32, .*q6_k$"):
        run(o_proj(floats, activations(1, 128), torch.zeros(1, 3)))
    with pytest.raises(ValueError, match="CPU kernels read no f8_e4m3"):
        floats.interleaved()
