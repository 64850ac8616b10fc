"""Planes, in which GPU kernels read blocks, hold the weights that the ``gguf`` package makes of a file's bytes, and of
f8_e4m3 those of torch's own dtype."""

import pytest
import torch

from skipkernels.errors import DeviceError, ModelError
from skipkernels.model.float8_blocks import float8_blocks
from skipkernels.model.matrix import BLOCK_FORMATS, GGUF_FORMATS, Matrix, StackedMatrix, merged
from skipkernels.model.planes import PLANE_FORMATS, PlaneSizes
from skipkernels.model.weights import into_planes
from tests.executors.block_case import BlockCase
from tests.executors.programs import same_bits
from tests.matrices import every_number, random_matrix

FORMATS = pytest.mark.parametrize("format", BLOCK_FORMATS)


@FORMATS
@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (37, 768), (5, 32), (3, 416)])
def test_planes_are_bit_for_bit_the_weights_of_the_blocks(format: str, rows: int, columns: int) -> None:
    if columns % BLOCK_FORMATS[format].block_columns:
        columns *= 8
    matrix = random_matrix(format, rows, columns, seed=rows)
    planes = matrix.arranged("planes")
    assert same_bits(planes.dequantize(), matrix.dequantize())
    some = torch.tensor([rows - 1, 0])
    assert same_bits(planes.dequantize_rows(some), matrix.dequantize_rows(some))


@pytest.mark.parametrize("format", GGUF_FORMATS)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_extreme_blocks(format: str, byte: int) -> None:
    """All codes, scales and minima at their limits; fp16 numbers are finite, as a NaN's bits are nobody's, and f8_e4m3
    is tried with all of its numbers below."""
    data = torch.full((2, BLOCK_FORMATS[format].row_bytes(512)), byte, dtype=torch.uint8)
    plain = random_matrix(format, 2, 512)
    blocks, halves = (each.view(2, -1, BLOCK_FORMATS[format].block_bytes) for each in (data, plain.data))
    for at in [208] if format == "q6_k" else [0, 2] if format in ("q4_1", "q5_1", "q4_k", "q5_k") else [0]:
        blocks[:, :, at : at + 2] = halves[:, :, at : at + 2]
    matrix = Matrix(format, 2, 512, data)
    assert same_bits(matrix.arranged("planes").dequantize(), matrix.dequantize())


def test_every_number_of_8_bits_keeps_its_bits() -> None:
    """All 254 that are no NaN, subnormal ones and both zeros among them, under scales of every size."""
    numbers = every_number().repeat(2, 1).view(-1, 256).view(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, -3e-5], [2.0**-140, 7e33]])
    matrix = Matrix("f8_e4m3", 2, 256, float8_blocks(numbers, scales))
    expected = (numbers.float().view(2, 2, 128) * scales[:, :, None]).view(2, 256)
    assert expected.isfinite().all()
    assert same_bits(matrix.dequantize(), expected)
    assert same_bits(matrix.arranged("planes").dequantize(), expected)


@FORMATS
def test_a_large_matrix_is_arranged_in_parts(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(format, 11, 256)
    whole = matrix.arranged("planes")
    monkeypatch.setattr("skipkernels.model.planes._CHUNK", 3 * 256)
    assert same_bits(matrix.arranged("planes").data, whole.data)
    assert same_bits(whole.dequantize(), matrix.dequantize())


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        ("q8_0", 8.5),
        ("q4_0", 4.5),
        ("q4_1", 5),
        ("q5_0", 5.5),
        ("q5_1", 6),
        ("q4_k", 4.625),
        ("q5_k", 5.625),
        ("q6_k", 6.5625),
        ("f8_e4m3", 8.25),
    ],
)
def test_planes_take_the_bits_of_their_format(format: str, bits: float) -> None:
    """Written out: codes and what a block of 32 shares; the K formats' 6-bit scales are spread to bytes."""
    matrix = random_matrix(format, 64, 512).arranged("planes")
    assert matrix.nbytes == matrix.data.nbytes == 64 * 512 * bits / 8
    assert PlaneSizes.of(format, 64, 512).nbytes == matrix.nbytes
    assert set(PLANE_FORMATS) == set(BLOCK_FORMATS)


def test_neighbours_of_one_format_become_one_matrix() -> None:
    parts = [random_matrix(format, 3, 256, seed=seed) for seed, format in enumerate(("q4_0", "q4_0", "q6_k", "q4_0"))]
    found = merged(parts)
    assert [(each.format, each.rows) for each in found] == [("q4_0", 6), ("q6_k", 3), ("q4_0", 3)]
    dequantized = torch.cat([each.dequantize() for each in found])
    assert same_bits(dequantized, torch.cat([each.dequantize() for each in parts]))


def test_planes_cannot_become_another_layout() -> None:
    with pytest.raises(ModelError, match="in layout planes cannot be brought into interleaved; load it again"):
        random_matrix("q4_0", 2, 32).arranged("planes").interleaved()


def test_a_models_matrices_become_planes_and_a_tied_head_stays_tied() -> None:
    weights = BlockCase.of("q4_0", "q8_0").weights(arrange=False)
    weights.lm_head = weights.embed_tokens
    before = weights.dequantized()
    into_planes(weights)
    assert weights.lm_head is weights.embed_tokens
    layer = weights.layers[0]
    assert isinstance(layer.qkv_proj, StackedMatrix)
    assert [part.format for part in layer.qkv_proj.parts] == ["q4_0", "q8_0"]  # q and k share one
    assert isinstance(layer.down_proj, Matrix)
    assert layer.down_proj.layout == "planes"
    after = weights.dequantized()
    for (name, old), (_, new) in zip(before.tensors(), after.tensors(), strict=True):
        assert same_bits(old, new), name


def test_neurons_of_blocks_are_refused_before_anything_is_arranged() -> None:
    weights = BlockCase.of("q4_0").weights(arrange=False)
    weights.neuron_rows = True
    with pytest.raises(DeviceError, match="single neurons of a down_proj in q4_0 cannot be left out on a GPU; "):
        into_planes(weights)
    assert weights.layers[0].o_proj.layout == "rows"
