"""AWQ checkpoints: what their words stand for, in which of our formats it lies, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipkernels import Engine
from skipkernels.errors import ModelError
from skipkernels.model.matrix import dequantized, formats_of
from skipkernels.model.weights import parameter_views
from tests.models import random_prompt, stock_tokens, tiny_module
from tests.packed_checkpoints import (
    AWQ_ORDER,
    awq_tensors,
    awq_values,
    edit_config,
    groups_of,
    matrices,
    packed_words,
    save_packed,
)

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
PROMPT = random_prompt(9)


def settings(group_size: int = 32, **others: Any) -> dict[str, Any]:
    told = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    return {**told, "modules_to_not_convert": ["lm_head"], **others}


def save(folder: Path, module: Any, group_size: int = 32, **others: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for layer, weight in matrices(module):
        tensors |= awq_tensors(layer, weight, groups_of(weight.shape[1], group_size))
    save_packed(folder, module, tensors, settings(group_size, **others))
    return tensors


@pytest.mark.parametrize(("family", "group_size"), [("llama", 32), ("qwen2", -1), ("phi3", 32)])
def test_every_value_is_the_checkpoint_s(tmp_path: Path, caplog: Any, family: str, group_size: int) -> None:
    """Bit for bit, in blocks and as fp32; tokens are transformers' on the same values."""
    module = tiny_module(family, **SIZES).half()
    tensors = save(tmp_path, module, group_size)
    own, floats = Engine.from_pretrained(tmp_path), Engine.from_pretrained(tmp_path, dtype="fp32")
    assert own.dtype == "fp16+q5_0"
    assert not [record for record in caplog.records if "tokenizer" not in record.getMessage()]
    views, reference = parameter_views(floats.config, floats.weights), tiny_module(family, **SIZES)
    reference.load_state_dict(module.float().state_dict())
    with torch.no_grad():
        for layer, _ in matrices(module):
            values = awq_values(tensors, layer)
            assert torch.equal(views[f"{layer}.weight"], values), layer
            reference.get_parameter(f"{layer}.weight").copy_(values)
    for quantised, exact in zip(own.weights.layers, floats.weights.layers, strict=True):
        for matrix in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            assert set(formats_of(getattr(quantised, matrix))) == {"q5_0"}
            assert torch.equal(dequantized(getattr(quantised, matrix)), getattr(exact, matrix))
    (answer,) = floats.generate([PROMPT], max_new_tokens=24, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(reference, PROMPT, 24)


def test_layers_that_are_not_converted(tmp_path: Path) -> None:
    module = tiny_module("llama", **SIZES).half()
    tensors = save(tmp_path, module, modules_to_not_convert=["lm_head", "down_proj"])
    path = tmp_path / "model.safetensors"
    left = {name: value for name, value in load_file(path).items() if "down_proj" not in name}
    down = {name: value for name, value in module.state_dict().items() if "down_proj" in name}
    save_file(left | down, path, metadata={"format": "pt"})
    layer = Engine.from_pretrained(tmp_path).weights.layers[1]
    assert torch.equal(layer.down_proj, down["model.layers.1.mlp.down_proj.weight"])  # type: ignore[arg-type]
    assert torch.equal(dequantized(layer.o_proj), awq_values(tensors, "model.layers.1.self_attn.o_proj"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 8}, "quantised by awq with 8 bits, which is not read; supported: 4 bits, version gemm"),
        ({"version": "gemv"}, "version 'gemv', which is not read"),
        ({"version": "gemv_fast"}, "version 'gemv_fast', which is not read"),
        ({"version": "marlin"}, "version 'marlin', which is not read"),
        ({"backend": "llm-awq"}, "version 'llm-awq', which is not read"),
        ({"zero_point": False}, "zero_point false, which is not read"),
        ({"group_size": None}, "group_size must be a whole number, got None"),
        ({"group_size": 48}, "64 rows of 64 columns cannot be packed in groups of 48 columns"),
        ({"group_size": 16}, r"qzeros' has shape \(2, 8\), expected \(4, 8\)"),
        ({"quant_method": "gptq", "sym": False}, r"qweight' has shape \(64, 8\), expected \(8, 64\)"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    save(tmp_path, tiny_module("llama", **SIZES).half())
    edit_config(tmp_path, quantization_config=settings() | changed)
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["scales", "qzeros", "qweight"])
def test_a_missing_tensor_is_named(tmp_path: Path, missing: str) -> None:
    save(tmp_path, tiny_module("llama", **SIZES).half())
    path, name = tmp_path / "model.safetensors", f"model.layers.1.mlp.up_proj.{missing}"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"'{name}' is missing"):
        Engine.from_pretrained(tmp_path)


def test_words_are_packed_as_described() -> None:
    """The loops of the tests themselves, on numbers written down."""
    words = packed_words(torch.arange(8).numpy()[None], 4, AWQ_ORDER)
    assert int(words[0, 0]) & 0xFFFFFFFF == 0x75316420
