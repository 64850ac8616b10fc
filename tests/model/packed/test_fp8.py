"""fp8 checkpoints as DeepSeek, Qwen and transformers write them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipkernels import Engine
from skipkernels.errors import ModelError
from skipkernels.model.matrix import formats_of
from skipkernels.model.weights import parameter_views
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


def test_nan_is_named(tmp_path: Path, caplog: Any) -> None:
    """e4m3 has a NaN, 0x7f."""
    tensors = save_fp8(
        tmp_path, tiny_module("llama", **SIZES, dtype=torch.bfloat16), (32, 32), "weight_scale_inv", [32, 32]
    )
    path, full = tmp_path / "model.safetensors", "model.layers.0.self_attn.o_proj.weight"
    tensors[full].view(torch.uint8)[3, 3] = 0x7F
    save_file(load_file(path) | {full: tensors[full]}, path, metadata={"format": "pt"})
    assert formats_of(Engine.from_pretrained(tmp_path).weights.layers[0].o_proj) == ("bf16",)
    assert "o_proj holds NaN or infinite values" in caplog.text
