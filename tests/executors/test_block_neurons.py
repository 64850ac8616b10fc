"""Single neurons of quantised matrices: orders in which one can be left unread, and kernels over lists of neurons."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from skipkernels import _C
from skipkernels.errors import DeviceError, ModelError
from skipkernels.model.matrix import GGUF_FORMATS, AnyMatrix, Matrix, StackedMatrix, column_nbytes, halves
from skipkernels.program.reference import REFERENCE
from skipkernels.program.table import Instruction, instruction
from tests.executors.programs import guarded, same_bits
from tests.executors.test_blocks import activations, gate_up, run
from tests.matrices import random_matrix, scale_offsets
from tests.tolerances import assert_close

ISAS = pytest.mark.parametrize("isa", _C.usable_isas())
FORMATS = pytest.mark.parametrize("format", GGUF_FORMATS)
SINGLE = pytest.mark.parametrize("layout", ["single_rows", "single_columns"])
NEURONS = 512
CHUNK = 128


@FORMATS
@SINGLE
@pytest.mark.parametrize("rows", [1, 37, 130, 600])
@pytest.mark.parametrize("threads", [1, 3])
def test_weights_that_lie_singly_are_bit_for_bit_those_of_the_gguf_package(
    format: str, layout: Any, rows: int, threads: int
) -> None:
    matrix = random_matrix(format, rows, 768, seed=rows)
    arranged = matrix.arranged(layout, threads)
    np.testing.assert_array_equal(
        arranged.dequantize().numpy().view(np.uint32), matrix.dequantize().numpy().view(np.uint32)
    )


@FORMATS
def test_rows_that_lie_singly_take_no_more_than_those_side_by_side(format: str) -> None:
    matrix = random_matrix(format, 32, 768)
    assert matrix.arranged("single_rows").nbytes == matrix.interleaved().nbytes


def test_a_matrix_is_arranged_once() -> None:
    arranged = random_matrix("q4_0", 32, 64).arranged("single_columns")
    assert arranged.arranged("single_columns") is arranged
    with pytest.raises(ModelError, match="in layout single_columns cannot be brought into interleaved"):
        arranged.interleaved()


def listed(neurons: list[int]) -> dict[str, torch.Tensor]:
    """The list's rest is undefined."""
    rest = [-1] * (NEURONS - len(neurons))
    return {
        "neurons": guarded(torch.tensor(neurons + rest, dtype=torch.int32)),
        "num_neurons": torch.tensor([len(neurons)], dtype=torch.int32),
    }


EVERY = list(range(NEURONS))
RANDOM = sorted(torch.randperm(NEURONS, generator=torch.Generator().manual_seed(1))[: NEURONS // 2].tolist())
SPARSE = [3, 4, 40, 75, 76, 77, 78, 79, 300, 480, 481, 511]
LISTS = pytest.mark.parametrize("neurons", [EVERY, RANDOM, SPARSE, [9]], ids=["every", "random", "sparse", "one"])


def gates(rows: int, neurons: list[int]) -> torch.Tensor:
    """Of each row some of the listed neurons, the first row's all; 0 elsewhere."""
    kept = torch.zeros(rows, NEURONS)
    kept[:, neurons] = activations(rows, len(neurons), seed=2)
    drawn = torch.rand(rows, NEURONS, generator=torch.Generator().manual_seed(3)) < 0.5
    return kept.where(drawn | (torch.arange(rows) == 0)[:, None], 0.0)


def up_proj_mul(matrix: AnyMatrix, x: torch.Tensor, intermediate: torch.Tensor, neurons: list[int]) -> Instruction:
    return instruction(
        "up_proj_mul",
        row_mask=torch.ones(len(x), dtype=torch.int32),
        hidden_states=guarded(x),
        post_attention_layernorm=torch.linspace(0.5, 1.5, x.shape[1]),
        up_proj=matrix,
        intermediate=intermediate,
        rms_norm_eps=1e-5,
        **listed(neurons),
    )


@ISAS
@FORMATS
@LISTS
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_up_proj_of_a_list_is_the_references(isa: str, format: str, neurons: list[int], rows: int) -> None:
    matrix, x = random_matrix(format, NEURONS, 256), activations(rows, 256)
    actual, expected = guarded(gates(rows, neurons)), gates(rows, neurons)
    run(up_proj_mul(matrix.arranged("single_rows"), x, actual, neurons), isa)
    REFERENCE["up_proj_mul"](up_proj_mul(matrix, x, expected, neurons))
    assert_close(actual, expected, "int8 activations")
    assert actual.abs().max() > 0


@ISAS
@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
@pytest.mark.parametrize("columns", [32, 96, 160, 576])
def test_rows_of_any_number_of_blocks_give_a_row_the_bits_it_gets_among_others(
    isa: str, format: str, columns: int
) -> None:
    """One row of activations goes along the rows of weights, several meet them side by side; the last blocks do not
    fill a vector, or the only ones."""
    matrix, x = random_matrix(format, NEURONS, columns).arranged("single_rows"), activations(3, columns)
    alone, together = torch.ones(3, NEURONS), torch.ones(3, NEURONS)
    for row in range(3):
        run(up_proj_mul(matrix, x[row : row + 1], alone[row : row + 1], RANDOM), isa)
    run(up_proj_mul(matrix, x, together, RANDOM), isa)
    assert same_bits(alone, together)
    assert len(alone[:, RANDOM].unique()) > 3 * len(RANDOM) // 2


def gate_then_up(stack: StackedMatrix, x: torch.Tensor, isa: str) -> torch.Tensor:
    """intermediate [rows, NEURONS] by the ops that can leave neurons out, every neuron listed."""
    gate, up = halves(stack)
    out = torch.zeros(len(x), NEURONS)
    common = gate_up(stack, x, out)
    operands = {name: tensor for name, tensor in common.tensors.items() if name != "gate_up_proj"}
    run(instruction("gate_proj_act", row_mask=common.row_mask, gate_proj=gate, **operands, **common.scalars), isa)
    run(up_proj_mul(up, x, out, EVERY), isa)
    return out


@ISAS
@FORMATS
@pytest.mark.parametrize("rows", [1, 20])
def test_a_full_list_gives_the_bits_of_interleaved_rows(isa: str, format: str, rows: int) -> None:
    gate, up = (random_matrix(format, NEURONS, 768, seed=seed) for seed in (0, 1))
    x = activations(rows, 768)
    usual, singly = torch.zeros(rows, NEURONS), torch.zeros(rows, NEURONS)
    stack = StackedMatrix((gate.interleaved(), up.arranged("single_rows")))
    run(gate_up(StackedMatrix((gate.interleaved(), up.interleaved())), x, usual), isa)
    run(gate_up(stack, x, singly), isa)
    assert same_bits(usual, singly)
    assert same_bits(usual, gate_then_up(stack, x, isa))


def down_proj(
    matrix: Matrix,
    intermediate: torch.Tensor,
    hidden: torch.Tensor,
    neurons: list[int] | None,
    partials: torch.Tensor | None = None,
) -> Instruction:
    return instruction(
        "down_proj_neurons_add",
        row_mask=torch.ones(len(hidden), dtype=torch.int32),
        intermediate=guarded(intermediate),
        down_proj=matrix.T,
        hidden_states=hidden,
        similarity_partials=partials,
        rows_per_partial=24,
        neuron_chunk=CHUNK,
        **({} if neurons is None else listed(neurons)),
    )


def down(matrix: Matrix, intermediate: torch.Tensor, neurons: list[int] | None, isa: str, threads: int = 2) -> Any:
    """hidden_states after it, from 1 everywhere."""
    out = guarded(torch.ones(len(intermediate), matrix.rows))
    run(down_proj(matrix.arranged("single_columns"), intermediate, out, neurons), isa, threads)
    return out


@ISAS
@FORMATS
@LISTS
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 21])
def test_down_proj_of_a_list_is_the_references(isa: str, format: str, neurons: list[int], rows: int) -> None:
    """Rows of both kinds, few and many, of which each has neurons of its own."""
    matrix, x = random_matrix(format, 203, NEURONS), gates(rows, neurons)
    actual, expected = (torch.ones(rows, 203) for _ in range(2))
    sums = [torch.zeros(9, rows, 3) for _ in range(2)]
    run(down_proj(matrix.arranged("single_columns"), x, actual, neurons, sums[0]), isa)
    REFERENCE["down_proj_neurons_add"](down_proj(matrix, x, expected, neurons, sums[1]))
    assert_close(actual, expected, "fp32")
    assert_close(*sums, "fp32")
    exact = 1 + x @ matrix.dequantize().T  # one activation of 32 is rounded to 127, exactly
    assert len(neurons) == 1 or not torch.allclose(actual, exact, rtol=1e-6, atol=1e-6)


@ISAS
@FORMATS
@pytest.mark.parametrize("hidden", [48, 64, 576, 600])
def test_every_neuron_without_a_list_is_the_dense_products(isa: str, format: str, hidden: int) -> None:
    """Sizes with and without whole chunks of rows; against down_proj_add on rows side by side, which adds the same
    integers."""
    matrix, x = random_matrix(format, hidden, NEURONS), activations(2, NEURONS)
    expected = torch.ones(2, hidden)
    run(
        instruction(
            "down_proj_add",
            row_mask=torch.ones(2, dtype=torch.int32),
            intermediate=x,
            down_proj=matrix.interleaved(),
            hidden_states=expected,
            similarity_partials=None,
            rows_per_partial=24,
        ),
        isa,
    )
    assert_close(down(matrix, x, None, isa), expected, "fp32")
    assert same_bits(down(matrix, x, None, isa), down(matrix, x, EVERY, isa))


@ISAS
@FORMATS
def test_a_row_alone_gets_the_bits_it_gets_among_others(isa: str, format: str) -> None:
    """Whatever neurons the others keep, in a list for the row alone or for all."""
    matrix, x = random_matrix(format, 203, NEURONS), gates(40, RANDOM)
    x[5], x[6] = 0.0, gates(1, SPARSE)[0]
    alone = {}
    for row in (0, 5, 6, 7):
        own = x[row].nonzero()[:, 0].tolist()
        alone[row] = down(matrix, x[row : row + 1], own, isa, threads=1)[0]
    for rows in (8, 40):
        union = (x[:rows] != 0).any(0).nonzero()[:, 0].tolist()
        together = down(matrix, x[:rows], union, isa, threads=3)
        for row, expected in alone.items():
            assert same_bits(together[row], expected), f"row {row} of {rows}"


@ISAS
@FORMATS
def test_what_no_listed_neuron_needs_is_not_read(isa: str, format: str) -> None:
    """Codes of neurons left out are others, scales of blocks of 32 without a listed one are NaN."""
    neurons = [j for j in RANDOM if j // 32 % 4 != 1 and j >= 256]  # of whole super-blocks, too
    matrix, x = random_matrix(format, 203, NEURONS), gates(3, neurons)
    block = GGUF_FORMATS[format]
    poisoned = matrix.data.clone().view(203, -1, block.block_bytes)
    for index in range(poisoned.shape[1]):
        first = index * block.block_columns
        if not any(first <= j < first + block.block_columns for j in neurons):
            poisoned[:, index] = 0xFF
            for at in scale_offsets(format):
                poisoned[:, index, at], poisoned[:, index, at + 1] = 0x00, 0x7E  # NaN
    other = replace(matrix, data=poisoned.view(203, -1))
    assert other.dequantize().isnan().any()
    assert same_bits(down(matrix, x, neurons, isa), down(other, x, neurons, isa))

    up, states = random_matrix(format, NEURONS, 256), activations(2, 256)
    rest = torch.ones(NEURONS, dtype=torch.bool)
    rest[neurons] = False
    data = up.data.clone()
    data[rest] = 0xFF
    products = []
    for own in (up, replace(up, data=data)):
        products.append(gates(2, neurons))
        run(up_proj_mul(own.arranged("single_rows"), states, products[-1], neurons), isa)
    assert same_bits(*products)


@ISAS
@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q5_1"])
def test_columns_that_are_left_out_have_no_say(isa: str, format: str) -> None:
    """Their codes lie between those of listed ones, under the same scales."""
    matrix, x = random_matrix(format, 203, NEURONS), gates(3, RANDOM)
    left_out = torch.ones(NEURONS, dtype=torch.bool)
    left_out[RANDOM] = False
    other = random_matrix(format, 203, NEURONS, seed=9)
    block = GGUF_FORMATS[format]
    arranged, changed = (each.arranged("single_columns") for each in (matrix, other))
    chunks = -(-203 // 64)
    pairs = -(-chunks // 2)
    column = 64 * {8: chunks, 4: pairs, 5: pairs + 1}[{"q8_0": 8, "q4_0": 4, "q5_1": 5}[format]]
    scales = chunks * 4 * (64 if format == "q5_1" else 32)
    assert arranged.nbytes == NEURONS // 32 * (scales + 32 * column)
    assert block.block_columns == 32
    view, source = (each.data.view(NEURONS // 32, -1) for each in (arranged, changed))
    codes, others = (each[:, scales:].reshape(NEURONS, column) for each in (view, source))
    mixed = torch.where(left_out[:, None], others, codes).view(NEURONS // 32, -1)
    data = torch.cat((view[:, :scales], mixed), dim=1).flatten()
    outs = []
    for own in (arranged, replace(arranged, data=data.clone())):
        outs.append(torch.ones(3, 203))
        run(down_proj(own, x, outs[-1], RANDOM), isa)
    assert same_bits(*outs)
    assert not torch.equal(replace(arranged, data=data).dequantize(), matrix.dequantize())


@FORMATS
@pytest.mark.parametrize("rows", [64, 203, 576])
def test_the_bytes_of_a_column_are_those_that_lie_between_two(format: str, rows: int) -> None:
    """Codes in whole cache lines; scales, which neighbours share, are not among them."""
    matrix, block = random_matrix(format, rows, NEURONS), GGUF_FORMATS[format]
    arranged = matrix.arranged("single_columns")
    assert column_nbytes(arranged) * NEURONS < arranged.nbytes
    least = matrix.rows * block.code_bytes / block.block_columns  # what codes take where nothing fills them up
    assert column_nbytes(matrix) == least <= column_nbytes(arranged) <= least + 64 * 3
    rest = arranged.nbytes - NEURONS * column_nbytes(arranged)
    scales = rows * (matrix.nbytes / rows - NEURONS * block.code_bytes / block.block_columns)
    assert rest >= scales


def test_chunks_that_cut_blocks_are_refused() -> None:
    matrix, x = random_matrix("q4_0", 64, NEURONS), gates(1, RANDOM)
    ins = down_proj(matrix.arranged("single_columns"), x, torch.ones(1, 64), RANDOM)
    with pytest.raises(RuntimeError, match="neuron_chunk must be a multiple of 32 on the CPU, got 80"):
        run(replace(ins, scalars={**ins.scalars, "neuron_chunk": 80}))


def test_matrices_in_another_order_are_refused_by_name() -> None:
    matrix, x = random_matrix("q4_0", 64, NEURONS), gates(1, RANDOM)
    with pytest.raises(
        DeviceError, match=r"needs down_proj of down_proj_neurons_add in layout single_columns, got interleaved"
    ):
        run(down_proj(matrix.interleaved(), x, torch.ones(1, 64), RANDOM))
