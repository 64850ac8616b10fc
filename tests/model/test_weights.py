"""Weights: a loaded module shares its storage, and nothing wrong in a checkpoint goes unnamed."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from skipkernels.demo import demo_model_path
from skipkernels.engine import Engine
from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import (
    ModelWeights,
    as_packed,
    expected_parameters,
    pack_module,
    parameter_views,
    random_weights,
)
from skipkernels.skipping.policy_file import load_policy
from tests.models import FAMILIES, random_prompt, stock_tokens, tiny_config, tiny_engine, tiny_module

PROMPT = random_prompt(12)
INDEX = "model.safetensors.index.json"


def packed(module: PreTrainedModel) -> tuple[ModelConfig, ModelWeights]:
    config = ModelConfig.from_hf(module.config)
    return config, pack_module(module, config, None, 32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_parameter_is_packed(family: str, tied: bool) -> None:
    module = tiny_module(family, tie_word_embeddings=tied)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    config, weights = packed(module)
    assert {name: tuple(parameter.shape) for name, parameter in before.items()} == expected_parameters(config)
    for name, view in parameter_views(config, weights).items():
        assert torch.equal(view, as_packed(config, name, before[name])), name
    assert sum(tensor.numel() for _, tensor in weights.tensors()) == sum(p.numel() for p in module.parameters())


def test_matrices_of_a_module_become_views_of_the_packed_ones() -> None:
    module = tiny_module("qwen2")
    _, weights = packed(module)
    for parameters, matrix in (
        ([module.model.layers[1].self_attn.get_submodule(f"{kind}_proj").weight for kind in "qkv"], "qkv_proj"),
        ([module.model.layers[1].mlp.get_submodule(f"{kind}_proj").weight for kind in ("gate", "up")], "gate_up_proj"),
        ([module.model.layers[1].self_attn.o_proj.weight], "o_proj"),
        ([module.model.layers[1].mlp.down_proj.weight], "down_proj"),
    ):
        home = getattr(weights.layers[1], matrix)
        address = home.data_ptr()
        for parameter in parameters:
            assert parameter.data_ptr() == address
            address += parameter.nbytes
        assert address == home.data_ptr() + home.nbytes
    assert module.model.embed_tokens.weight.data_ptr() == weights.embed_tokens.data_ptr()
    assert module.lm_head.weight.data_ptr() == weights.lm_head.data_ptr()


def test_tied_embeddings_stay_tied() -> None:
    module = tiny_module(tie_word_embeddings=True)
    _, weights = packed(module)
    assert weights.lm_head is weights.embed_tokens
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    assert module.lm_head.weight.data_ptr() == weights.embed_tokens.data_ptr()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_packed_module_works_as_before(family: str) -> None:
    module = tiny_module(family)
    with torch.inference_mode():
        logits = module(torch.tensor([PROMPT])).logits
    tokens = stock_tokens(module, PROMPT, 16)
    first, second = tiny_engine(module=module), tiny_engine(module=module)
    with torch.inference_mode():
        assert torch.equal(module(torch.tensor([PROMPT])).logits, logits)
    assert stock_tokens(module, PROMPT, 16) == tokens
    assert [engine.generate(PROMPT, max_new_tokens=16)[0].token_ids for engine in (first, second)] == [tokens] * 2


def test_a_change_of_the_module_is_a_change_of_the_engine() -> None:
    module = tiny_module()
    engine = tiny_engine(module=module)
    with torch.no_grad():
        module.model.layers[2].mlp.up_proj.weight.mul_(-3)
        module.lm_head.weight.mul_(-1)
    assert engine.generate(PROMPT, max_new_tokens=16)[0].token_ids == stock_tokens(module, PROMPT, 16)


def test_another_dtype_leaves_the_module_alone() -> None:
    module = tiny_module()
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    engine = tiny_engine(module=module, dtype="bf16")
    assert engine.dtype == "bf16"
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_the_fingerprint_is_the_models_and_not_the_dtypes() -> None:
    first, other = tiny_engine(module=tiny_module(dtype=torch.bfloat16)), tiny_engine(module=tiny_module(seed=1))
    assert first.fingerprint == tiny_engine(module=tiny_module(dtype=torch.bfloat16), dtype="fp32").fingerprint
    assert first.fingerprint != other.fingerprint
    assert first.fingerprint != tiny_engine("mistral").fingerprint


def test_random_weights_have_every_shape() -> None:
    config = ModelConfig.from_hf(tiny_config("qwen3 with sliding layers and bias"))
    weights = random_weights(config, torch.bfloat16, 16)
    views = parameter_views(config, weights)
    assert {name: tuple(view.shape) for name, view in views.items()} == expected_parameters(config)
    assert all(view.isfinite().all() for view in views.values())
    assert weights.dtype == torch.bfloat16


# --- what can be wrong with a checkpoint


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def single(tmp_path: Path) -> Path:
    tiny_module().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tiny_module().save_pretrained(tmp_path, max_shard_size="60KB")
    return tmp_path


def test_a_missing_shard_is_named(sharded: Path) -> None:
    next(sharded.glob("model-00002-*")).unlink()
    with pytest.raises(ModelError, match=r"shard model-00002-of-\d+.safetensors is missing; the index names it"):
        tiny_engine(module=sharded)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(sharded: Path, kept: int) -> None:
    shard = next(sharded.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model-00002-.*: cannot be read, probably truncated"):
        tiny_engine(module=sharded)


def test_an_index_that_is_wrong_about_a_tensor_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = shards[0]
    index["weight_map"]["lm_head.weight"] = shards[-1]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is missing, although the index places it here"):
        tiny_engine(module=sharded)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_an_unreadable_index_is_named(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(ModelError, match="not a readable safetensors index"):
        tiny_engine(module=sharded)


def test_a_missing_tensor_is_named(single: Path) -> None:
    _edit(single / "model.safetensors", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"tensor 'model.layers.2.mlp.up_proj.weight' is missing"):
        tiny_engine(module=single)


def test_a_tensor_of_the_wrong_shape_is_named(single: Path) -> None:
    _edit(
        single / "model.safetensors",
        lambda tensors: tensors.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(21, 40)}),
    )
    with pytest.raises(ModelError, match=r"k_proj.weight' has shape \(21, 40\), expected \(20, 40\)"):
        tiny_engine(module=single)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_warned_of_by_name(
    single: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.mlp.down_proj.weight"][1, 2] = value
        tensors["model.norm.weight"][0] = value

    _edit(single / "model.safetensors", poison)
    with caplog.at_level(logging.WARNING, logger="skipkernels"):
        engine = tiny_engine(module=single)
    warned = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert [message.split()[0] for message in sorted(warned)] == [
        "model.layers.3.mlp.down_proj.weight",
        "model.norm.weight",
    ]
    engine.generate(PROMPT, max_new_tokens=4)


def test_healthy_weights_are_not_warned_of(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="skipkernels"):
        tiny_engine(module=single)
    assert [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()] == []


def test_a_folder_without_weights_is_an_error(single: Path) -> None:
    (single / "model.safetensors").rename(single / "model.gone")
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors nor .*; only safetensors are read"):
        tiny_engine(module=single)


def test_a_module_with_a_missing_or_misshapen_parameter_is_left_alone() -> None:
    module = tiny_module()
    module.model.layers[3].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(3, 3))
    addresses = [parameter.data_ptr() for parameter in module.parameters()]
    with pytest.raises(ModelError, match=r"down_proj.weight' has shape \(3, 3\), expected \(40, 72\)"):
        packed(module)
    assert [parameter.data_ptr() for parameter in module.parameters()] == addresses
    del module.model.layers[3].mlp.down_proj
    with pytest.raises(ModelError, match=r"parameter 'model.layers.3.mlp.down_proj.weight' is missing"):
        packed(module)


def test_a_module_elsewhere_must_come_to_the_cpu_first() -> None:
    with pytest.raises(ModelError, match="is on meta; move the module to cpu first"):
        packed(tiny_module().to("meta"))


def test_the_bundled_policy_stays_bound_to_its_model_when_the_config_grows() -> None:
    config = ModelConfig.from_hf(tiny_config())
    assert config.architecture_hash() == replace(config, activation="silu").architecture_hash()
    assert config.architecture_hash() != replace(config, activation="gelu_tanh").architecture_hash()
    load_policy(
        demo_model_path() / "skip_policy.json", fingerprint=Engine.from_pretrained(demo_model_path()).fingerprint
    )
