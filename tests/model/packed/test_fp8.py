"""fp8 checkpoints as DeepSeek, Qwen and transformers write them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipkernels import Engine
from skipkernels.errors import ModelError
from skipkernels.model.matrix import BLOCK_FORMATS, GGUF_FORMATS, block_formats_on, formats_of
from skipkernels.model.packed.float8_matrix import Float8Matrix
from skipkernels.model.weights import parameter_views
from tests.executors.programs import same_bits
from tests.matrices import every_number
from tests.models import random_prompt, stock_tokens, tiny_module
from tests.packed_checkpoints import ALL, edit_config, edit_tensors, fp8_settings, matrices, save_fp8

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
PROMPT = random_prompt(9)
Tensors = dict[str, torch.Tensor]


def value_of(number: int) -> float:
    """e4m3 by its bits: sign, four of an exponent less 7, three of a fraction."""
    exponent, fraction = number >> 3 & 15, number & 7
    size = fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return -size if number & 128 else size


def fp8_values(tensors: Tensors, layer: str, tile: tuple[int, int], name: str) -> torch.Tensor:
    """What the tensors of a layer stand for, a number at a time."""
    numbers, scales = tensors[f"{layer}.weight"].view(torch.uint8), tensors[f"{layer}.{name}"]
    table, out = [value_of(number) for number in range(256)], torch.empty(numbers.shape)
    for row, listed in enumerate(numbers.tolist()):
        for column, number in enumerate(listed):
            out[row, column] = table[number] * scales[row // tile[0], column // tile[1]]
    return out


@pytest.mark.parametrize(
    ("tile", "name", "told"),
    [
        ((32, 32), "weight_scale_inv", [32, 32]),  # 80 columns: the last tiles are narrower
        ((1, ALL), "weight_scale", None),
        ((ALL, ALL), "weight_scale", None),
    ],
)
def test_every_value_is_the_checkpoint_s(
    tmp_path: Path, caplog: Any, tile: tuple[int, int], name: str, told: list[int] | None
) -> None:
    module = tiny_module("qwen3", **SIZES, dtype=torch.bfloat16)
    tensors = save_fp8(tmp_path, module, tile, name, told)
    own = Engine.from_pretrained(tmp_path)
    assert own.dtype == "bf16"
    assert "no CPU kernels read F8_E4M3; 14 matrices are dequantised to bf16, 8 significant bits" in caplog.text
    assert "config.json asks for activations in fp8; weights alone are read so" in caplog.text
    floats = Engine.from_pretrained(tmp_path, dtype="fp32")
    views, kept = parameter_views(floats.config, floats.weights), parameter_views(own.config, own.weights)
    reference = tiny_module("qwen3", **SIZES)
    reference.load_state_dict(module.float().state_dict())
    with torch.no_grad():
        for layer, _ in matrices(module):
            values = fp8_values(tensors, layer, tile, name)
            assert torch.equal(views[f"{layer}.weight"], values), layer
            assert torch.equal(kept[f"{layer}.weight"], values.bfloat16()), layer
            reference.get_parameter(f"{layer}.weight").copy_(values)
    (answer,) = floats.generate([PROMPT], max_new_tokens=24, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(reference, PROMPT, 24)
    sizes = {**SIZES, "intermediate_size": 96, "head_dim": 16}
    save_fp8(tmp_path / "wide", tiny_module("qwen3", **sizes, dtype=torch.bfloat16), tile, name, told)
    assert Engine.from_pretrained(tmp_path / "wide", dtype="q8_0").dtype == "q8_0"


def test_a_scale_for_activations_is_left_out(tmp_path: Path, caplog: Any) -> None:
    save_fp8(tmp_path, tiny_module("llama", **SIZES, dtype=torch.bfloat16), (ALL, ALL), "weight_scale", None)
    path = tmp_path / "model.safetensors"
    inputs = {"model.layers.0.mlp.down_proj.input_scale": torch.tensor(0.5)}
    save_file(load_file(path) | inputs, path, metadata={"format": "pt"})
    Engine.from_pretrained(tmp_path)
    assert "config.json asks for activations in fp8; weights alone are read so" in caplog.text


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ([32], r"weight_block_size must be two whole numbers of at least 1, got \[32\]"),
        ([0, 32], r"weight_block_size must be two whole numbers of at least 1, got \[0, 32\]"),
        ("32", "weight_block_size must be two whole numbers"),
        ([16, 16], r"weight_scale_inv' has shape \(\d, \d\), expected \(\d, \d\)"),
        (None, r"weight_scale_inv' has shape \(\d, \d\), expected \(\d+, 1\)"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, told: Any, message: str) -> None:
    save_fp8(tmp_path, tiny_module("llama", **SIZES, dtype=torch.bfloat16), (32, 32), "weight_scale_inv", [32, 32])
    edit_config(tmp_path, quantization_config=fp8_settings(told))
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_scale_inv", None, "o_proj.weight_scale_inv' is missing"),
        ("weight", torch.zeros(64, 64), "o_proj.weight' has dtype F32, expected one of F8_E4M3"),
        ("weight", torch.zeros(64, 64).to(torch.float8_e5m2), "has dtype F8_E5M2, expected one of F8_E4M3"),
        ("weight_scale_inv", torch.full((2, 2), float("nan")), "its scales hold NaN or infinite values"),
        ("weight_scale_inv", torch.zeros(2, 2, dtype=torch.uint8), "dtype U8, expected one of F32, BF16, F16"),
        ("weight_scale", torch.ones(1), "o_proj.weight_scale' means nothing to this model"),
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    save_fp8(tmp_path, tiny_module("llama", **SIZES, dtype=torch.bfloat16), (32, 32), "weight_scale_inv", [32, 32])
    edit_tensors(tmp_path, **{name: value})
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize("number", [0x7F, 0xFF])
@pytest.mark.parametrize("dtype", [None, "fp32", "q8_0"])
def test_nan_is_refused_by_name(tmp_path: Path, number: int, dtype: str | None) -> None:
    """e4m3 has two."""
    sizes = {**SIZES, "intermediate_size": 96}
    module = tiny_module("llama", **sizes, dtype=torch.bfloat16)
    tensors = save_fp8(tmp_path, module, (32, 32), "weight_scale_inv", [32, 32])
    path, full = tmp_path / "model.safetensors", "model.layers.0.self_attn.o_proj.weight"
    tensors[full].view(torch.uint8)[3, 3] = number
    save_file(load_file(path) | {full: tensors[full]}, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="o_proj: its numbers hold NaN; the checkpoint is corrupt"):
        Engine.from_pretrained(tmp_path, dtype=dtype)


def float8_matrix(rows: int, columns: int, tile: tuple[int, int], nan_at: int | None = None) -> Float8Matrix:
    bits = every_number().repeat(-(-rows * columns // 256))[: rows * columns].view(rows, columns)
    if nan_at is not None:
        bits[nan_at // columns, nan_at % columns] = 0xFF
    scales = torch.randn(-(-rows // tile[0]), -(-columns // tile[1]), generator=torch.Generator().manual_seed(1))
    return Float8Matrix("up_proj", columns, scales.bfloat16(), tile, lambda: bits.view(torch.float8_e4m3fn))


@pytest.mark.parametrize("tile", [(2, 128), (5, 256), (1, 384), (5, 384), (ALL, ALL), (3, 1024)])
def test_blocks_hold_the_values_bit_for_bit(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int]) -> None:
    """Tiles of several blocks, the last of which is narrower, and parts of a matrix that cut tiles."""
    monkeypatch.setattr("skipkernels.model.packed.float8_matrix._CHUNK", 3 * 384)
    matrix, floats = float8_matrix(5, 384, tile), torch.empty(5, 384)
    matrix.copy_floats(floats)
    assert matrix.format() == "f8_e4m3"
    assert not matrix.rounds_scales()
    assert same_bits(matrix.blocks().dequantize(), floats)


@pytest.mark.parametrize(
    ("columns", "tile", "format"),
    [
        (192, (1, 192), "f8_e4m3 in rows of 192 columns"),
        (192, (128, 128), "f8_e4m3 in rows of 192 columns"),
        (384, (64, 64), "f8_e4m3 in tiles of 64 columns"),
        (384, (1, 192), "f8_e4m3 in tiles of 192 columns"),
    ],
)
def test_matrices_whose_blocks_would_be_cut_are_none_of_a_block_format(
    columns: int, tile: tuple[int, int], format: str
) -> None:
    assert float8_matrix(5, columns, tile).format() == format


def test_nan_is_not_put_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels would read it as a number."""
    monkeypatch.setattr("skipkernels.model.packed.float8_matrix._CHUNK", 256)
    with pytest.raises(ModelError, match="up_proj: its numbers hold NaN"):
        float8_matrix(5, 128, (5, 128), nan_at=4 * 128 + 7).blocks()


def test_what_becomes_of_a_matrix_depends_on_the_device_s_kernels(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And why one became floats is said where others stay as they are."""
    sizes = {**SIZES, "intermediate_size": 128}
    save_fp8(tmp_path, tiny_module("llama", **sizes, dtype=torch.bfloat16), (1, ALL), "weight_scale", None)
    assert formats_of(Engine.from_pretrained(tmp_path).weights.layers[0].down_proj) == ("bf16",)
    assert "no CPU kernels read F8_E4M3; 14 matrices are dequantised to bf16" in caplog.text
    caplog.clear()
    assert block_formats_on("cpu") == GGUF_FORMATS
    assert block_formats_on("cuda:1") == BLOCK_FORMATS
    monkeypatch.setattr("skipkernels.model.block_weights.block_formats_on", lambda _: BLOCK_FORMATS)
    (layer, _) = Engine.from_pretrained(tmp_path, executor="reference").weights.layers
    assert (formats_of(layer.down_proj), formats_of(layer.o_proj)) == (("f8_e4m3",), ("bf16",))
    assert "read F8_E4M3 IN ROWS OF 64 COLUMNS; 12 matrices are dequantised to bf16" in caplog.text
