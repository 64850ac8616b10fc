"""Matrices of blocks: what they refuse, and that they unpack bit for bit as the gguf package does."""

import gguf
import numpy as np
import pytest
import torch

from skipkernels.errors import ModelError
from skipkernels.model.matrix import (
    BLOCK_FORMATS,
    GGUF_FORMATS,
    Matrix,
    StackedMatrix,
    dequantized,
    formats_of,
    weight_rows,
)
from tests.matrices import random_matrix

FORMATS = pytest.mark.parametrize("format", BLOCK_FORMATS)


@pytest.mark.parametrize("format", GGUF_FORMATS)
def test_block_sizes_are_those_of_the_gguf_package(format: str) -> None:
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[format.upper()]]
    assert (BLOCK_FORMATS[format].block_columns, BLOCK_FORMATS[format].block_bytes) == (columns, size)


@FORMATS
def test_a_row_of_the_weights_is_the_row_of_all(format: str) -> None:
    matrix = random_matrix(format, 7, 512, seed=3)
    rows = torch.tensor([5, 0, 5])
    np.testing.assert_array_equal(weight_rows(matrix, rows).numpy(), dequantized(matrix)[rows].numpy())


def test_parts_of_a_stack_keep_their_formats() -> None:
    parts = (random_matrix("q4_k", 3, 256), random_matrix("q6_k", 5, 256))
    stack = StackedMatrix(parts)
    assert stack.shape == (8, 256)
    assert formats_of(stack) == ("q4_k", "q6_k")
    assert stack.nbytes == 3 * 144 + 5 * 210
    np.testing.assert_array_equal(dequantized(stack)[3:].numpy(), dequantized(parts[1]).numpy())


@pytest.mark.parametrize(
    ("format", "rows", "columns", "shape", "message"),
    [
        ("q2_k", 1, 256, (1, 84), "matrix format 'q2_k' is not supported; use one of q8_0, q4_0"),
        ("q4_0", 1, 33, (1, 18), "q4_0 needs a multiple of 32 columns, got 33"),
        ("q4_k", 1, 288, (1, 162), "q4_k needs a multiple of 256 columns, got 288"),
        ("f8_e4m3", 1, 192, (1, 198), "f8_e4m3 needs a multiple of 128 columns, got 192"),
        ("q8_0", 2, 64, (2, 67), r"2 x 64 weights in q8_0 are \[2, 68\] bytes, got \[2, 67\]"),
    ],
)
def test_a_matrix_that_contradicts_itself_is_refused(
    format: str, rows: int, columns: int, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        Matrix(format, rows, columns, torch.zeros(shape, dtype=torch.uint8))


def test_matrices_of_different_widths_do_not_stack() -> None:
    with pytest.raises(ModelError, match="as many columns"):
        StackedMatrix((random_matrix("q8_0", 2, 32), random_matrix("q8_0", 2, 64)))
