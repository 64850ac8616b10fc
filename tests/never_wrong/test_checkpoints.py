"""Checkpoints that are not what they seem: decoded as transformers does, or refused by name."""

import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from skipkernels.engine import Engine
from skipkernels.errors import DeviceError, ModelError, RequestError
from skipkernels.skipping.policy import SkipPolicy
from skipkernels.skipping.policy_file import load_policy, save_policy
from tests.models import FAMILIES, stock_tokens, tiny_engine, tiny_module
from tests.never_wrong.folders import (
    PROMPT,
    WEIGHTS,
    edit_json,
    edit_tensors,
    engine_of,
    engine_tokens,
    expected_tokens,
    loaded,
    save,
)
from tests.never_wrong.tokenizers import sentencepiece_model

INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj"


# --- quantised


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int8,
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.float64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
@pytest.mark.parametrize("name", [DOWN, "lm_head", "model.embed_tokens", "model.norm"])
def test_a_dtype_that_is_not_read_is_refused_by_name(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({f"{name}.weight": tensors[f"{name}.weight"].to(dtype)}))
    with pytest.raises(ModelError, match=rf"'{name}.weight' has dtype .*, expected one of F32, BF16, F16"):
        engine_of(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        f"{DOWN}.weight_scale",
        f"{DOWN}.weight_scale_inv",
        f"{DOWN}.input_scale",
        f"{DOWN}.weight.absmax",
        f"{DOWN}.weight.quant_state.bitsandbytes__nf4",
        f"{DOWN}.SCB",
        f"{DOWN}.scales",
        f"{DOWN}.qzeros",
        f"{DOWN}.qweight",
        f"{DOWN}.g_idx",
        f"{DOWN}.bias",
        f"{DOWN}.lora_A.weight",
        f"{DOWN}.base_layer.weight",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.sinks",
        "model.layers.0.pre_feedforward_layernorm.weight",
        "model.norm.bias",
        "lm_head.weight_scale",
        "lm_head.bias",
    ],
)
def test_a_tensor_beside_a_known_one_is_refused_by_name(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(ModelError, match=f"'{name}' means nothing to this model"):
        engine_of(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"load_in_8bit": True}},
        {"quantization_config": {"quant_method": "a method of next year"}},
        {"quantization_config": {}},
        {"compression_config": {"format": "int-quantized"}},
    ],
)
def test_a_quantisation_entry_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    save(tmp_path)
    edit_json(tmp_path, **entry)
    with pytest.raises(ModelError, match=r"quanti[sz]"):
        engine_of(tmp_path)


def test_no_quantisation_is_none(tmp_path: Path) -> None:
    save(tmp_path)
    edit_json(tmp_path, quantization_config=None)
    assert engine_tokens(tmp_path) == expected_tokens(loaded(tmp_path))


def test_tensors_of_no_part_of_the_decoder_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path)
    extra = {"score.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(extra))
    edit_json(tmp_path, num_hidden_layers=3)
    with caplog.at_level(logging.WARNING):
        tokens = engine_tokens(tmp_path)
    assert tokens == expected_tokens(loaded(tmp_path))
    assert "left out 10 tensors" in caplog.text


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="adapters are not read"):
        engine_of(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match="only an adapter; merge it into its base model"):
        engine_of(tmp_path)


# --- tied and untied heads


def test_a_head_of_its_own_counts_although_the_config_says_tied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path)
    edit_json(tmp_path, tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING):
        tokens = engine_tokens(tmp_path)
    assert tokens == expected_tokens(loaded(tmp_path))
    assert "lm_head.weight; it is used" in caplog.text


@pytest.mark.parametrize("kept", ["both", "head", "embeddings"])
def test_a_tied_head_may_lie_in_the_file_once_or_twice(tmp_path: Path, kept: str) -> None:
    save(tmp_path, tie_word_embeddings=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if kept != "both":
            del tensors["model.embed_tokens.weight" if kept == "head" else "lm_head.weight"]

    edit_tensors(tmp_path, change)
    engine = engine_of(tmp_path)
    assert engine.weights.lm_head is engine.weights.embed_tokens
    assert engine.generate(PROMPT, max_new_tokens=16)[0].token_ids == expected_tokens(loaded(tmp_path))


# --- ends of sequence


@pytest.mark.parametrize("eos", ["int", "list", "zero", None])
@pytest.mark.parametrize("where", ["config.json", "generation_config.json", "both differ", "generation config without"])
@pytest.mark.parametrize("tokenizer", [False, True], ids=["no tokenizer", "another in the tokenizer"])
def test_ends_are_those_of_transformers_generation_config(
    tmp_path: Path, eos: str | None, where: str, tokenizer: bool
) -> None:
    save(tmp_path, tokenizer=tokenizer)
    generated = stock_tokens(loaded(tmp_path), PROMPT, 16)
    value = {"int": generated[5], "list": [258, generated[3]], "zero": 0, None: None}[eos]
    (tmp_path / "generation_config.json").unlink()
    if where == "config.json":
        edit_json(tmp_path, eos_token_id=value)
    else:
        (tmp_path / "generation_config.json").write_text("{}")
        edit_json(tmp_path, eos_token_id=generated[1] if where == "both differ" else value)
        if where != "generation config without":
            edit_json(tmp_path, "generation_config.json", eos_token_id=value)
    assert engine_tokens(tmp_path) == expected_tokens(loaded(tmp_path))


@pytest.mark.parametrize("content", ["{", "not json", '{"eos_token_id": 3, "an unknown entry": [1]}'])
def test_a_corrupt_or_strange_generation_config_is_taken_as_transformers_does(tmp_path: Path, content: str) -> None:
    save(tmp_path)
    edit_json(tmp_path, eos_token_id=[7, expected_tokens(loaded(tmp_path))[2]])
    (tmp_path / "generation_config.json").write_text(content)
    assert engine_tokens(tmp_path) == expected_tokens(loaded(tmp_path))


@pytest.mark.parametrize("content", ["[]", "null", '{"eos_token_id": "3"}', '{"eos_token_id": [1.5]}'])
def test_a_generation_config_that_cannot_be_meant_is_one_line(tmp_path: Path, content: str) -> None:
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"generation config|eos_token_id must be an integer"):
        engine_of(tmp_path)


def test_a_repetition_penalty_of_the_model_is_the_default(tmp_path: Path) -> None:
    save(tmp_path)
    edit_json(tmp_path, "generation_config.json", repetition_penalty=1.8)
    module = loaded(tmp_path)
    ids = torch.tensor([PROMPT])
    stock = module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert engine_tokens(tmp_path) == stock[0, len(PROMPT) :].tolist() != expected_tokens(module)


@pytest.mark.parametrize(
    "entry",
    [
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [5]},
        {"num_beams": 2},
        {"bad_words_ids": [[3]]},
        {"min_new_tokens": 4},
        {"guidance_scale": 1.5},
        {"stop_strings": ["x"]},
        {"penalty_alpha": 0.5},
    ],
)
def test_what_the_model_wants_and_is_not_done_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    save(tmp_path)
    edit_json(tmp_path, "generation_config.json", **entry)
    with pytest.raises(RequestError, match=f"{next(iter(entry))}=.* is not supported; pass sampling="):
        engine_tokens(tmp_path)


# --- entries that a family does not read


@pytest.mark.parametrize(
    ("family", "entries"),
    [
        ("llama", {"sliding_window": 3}),
        ("llama", {"sliding_window": 3, "layer_types": ["sliding_attention"] * 4}),
        ("llama", {"layer_types": ["full_attention"] * 4, "use_sliding_window": True}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 2, 2]}}),
        ("llama", {"attention_multiplier": 3.0, "logits_scaling": 2.0, "final_logit_softcapping": 1.0}),
        ("mistral", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"] * 2}),
        ("qwen2", {"attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"attention_bias": False}),
        ("qwen2", {"sliding_window": 3}),
        ("qwen2", {"sliding_window": 3, "use_sliding_window": True, "layer_types": ["full_attention"] * 4}),
        ("qwen3", {"sliding_window": 3, "use_sliding_window": False, "mlp_bias": True}),
    ],
)
def test_entries_count_only_where_the_family_reads_them(tmp_path: Path, family: str, entries: dict[str, Any]) -> None:
    save(tmp_path, family)
    edit_json(tmp_path, **entries)
    assert engine_tokens(tmp_path) == expected_tokens(loaded(tmp_path))


@pytest.mark.parametrize(
    ("family", "entries", "message"),
    [
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "there is no sliding_window"),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "linear_attention"),
        ("mistral", {"sliding_window": 0}, "sliding_window must be at least 1"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            "one set for all",
        ),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ("llama", {"auto_map": {"AutoConfig": "own.Config"}, "model_type": "own"}, "config.json cannot be read"),
        ("llama", {"rms_norm_eps": "small"}, "config.json cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, family: str, entries: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    save(tmp_path, family)
    edit_json(tmp_path, **entries)
    with pytest.raises(ModelError, match=message) as caught:
        engine_of(tmp_path)
    assert "\n" not in str(caught.value)


# --- files


def test_the_single_file_counts_beside_a_stale_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_module(seed=1).save_pretrained(tmp_path, max_shard_size="60KB")
    save(tmp_path)
    assert (tmp_path / INDEX).exists()
    with caplog.at_level(logging.WARNING):
        tokens = engine_tokens(tmp_path)
    assert tokens == expected_tokens(loaded(tmp_path)) == expected_tokens(tiny_module())
    assert f"{WEIGHTS} and {INDEX}" in caplog.text


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tiny_module().save_pretrained(tmp_path, max_shard_size="60KB")
    first, second = sorted(tmp_path.glob("model-*"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name] + 1}, second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"tensor '{name}' lies in model-00001.* and model-00002"):
        engine_of(tmp_path)


@pytest.mark.parametrize("weight_map", [{}, {"x": 3}, {"x": "../model.safetensors"}, ["x"], None])
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, weight_map: object) -> None:
    tiny_module().save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=INDEX):
        engine_of(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_models_names_have_no_prefix(tmp_path: Path, tied: bool) -> None:
    save(tmp_path, tie_word_embeddings=tied)
    names = load_file(tmp_path / WEIGHTS)
    save_file({name.removeprefix("model."): tensor for name, tensor in names.items()}, tmp_path / WEIGHTS)
    assert engine_tokens(tmp_path) == expected_tokens(tiny_module(tie_word_embeddings=tied))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 40},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 1.5},
    ],
)
def test_stretched_embeddings_reach_beyond_the_configured_length(tmp_path: Path, rope: dict[str, Any]) -> None:
    save(tmp_path)
    edit_json(tmp_path, rope_parameters=rope, max_position_embeddings=40)
    prompt = [*PROMPT, *PROMPT, *PROMPT, *PROMPT]
    (answer,) = engine_of(tmp_path, max_seq_len=90).generate(prompt, max_new_tokens=20)
    assert answer.token_ids == expected_tokens(loaded(tmp_path), prompt, 20)


def test_a_length_that_no_memory_holds_is_refused() -> None:
    with pytest.raises(DeviceError, match=f"no memory for max_seq_len={1 << 40}"):
        tiny_engine("llama with yarn rope", max_seq_len=1 << 40)


@pytest.mark.parametrize(
    ("name", "message"), [("model.gguf", "model.gguf: no such file"), ("there.gguf", "there.gguf: is truncated")]
)
def test_a_gguf_file_that_is_none(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "there.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=message):
        engine_of(tmp_path / name)


# --- tokenizers


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"[1"),
        ("tokenizer_config.json", b'{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}'),
    ],
)
def test_a_corrupt_tokenizer_is_one_line(
    tmp_path: Path, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    save(tmp_path, tokenizer=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match="its tokenizer cannot be read") as caught:
        engine_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_sentencepiece_file_alone_is_a_tokenizer(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    if find_spec("sentencepiece"):
        assert engine_of(tmp_path).encode("hi") == AutoTokenizer.from_pretrained(tmp_path).encode("hi")
    else:
        with pytest.raises(ModelError, match=r"a tokenizer.model needs `pip install sentencepiece`"):
            engine_of(tmp_path)


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match="its tokenizer has no vocabulary"):
        engine_of(tmp_path)


# --- fingerprints


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.2.mlp.up_proj.weight",
        f"{DOWN}.weight",
        "model.layers.3.post_attention_layernorm.weight",
    ],
)
def test_a_fine_tune_of_any_matrix_is_another_model(tmp_path: Path, name: str) -> None:
    parent, child = save(tmp_path / "parent"), tmp_path / "child"
    shutil.copytree(parent, child)
    edit_tensors(child, lambda tensors: tensors[name].view(-1)[7:8].mul_(1.1))
    assert engine_of(parent).fingerprint != engine_of(child).fingerprint


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3 with sliding layers and bias"])
def test_the_fingerprint_is_that_of_the_checkpoint(tmp_path: Path, family: str) -> None:
    assert family in FAMILIES
    save(tmp_path, family)
    fingerprints = {engine_of(tmp_path, dtype=dtype).fingerprint for dtype in ("fp32", "bf16", "fp16")}
    assert fingerprints == {tiny_engine(module=loaded(tmp_path)).fingerprint}


def test_an_old_policy_file_loads_for_its_own_model_only(tmp_path: Path) -> None:
    policy, engine = SkipPolicy(threshold=0.9), tiny_engine()
    old = engine.fingerprint.partition(".")[0]
    assert len(old) == 16
    save_policy(tmp_path / "old.json", policy, fingerprint=old, measured={})
    assert load_policy(tmp_path / "old.json", fingerprint=engine.fingerprint) == policy
    with pytest.raises(ValueError, match="was calibrated for"):
        load_policy(tmp_path / "old.json", fingerprint=tiny_engine(module=tiny_module(seed=1)).fingerprint)


def test_a_tensor_with_and_without_its_prefix_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    name = "layers.0.mlp.down_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: -tensors["model." + name]}))
    with pytest.raises(ModelError, match="stands there twice"):
        Engine.from_pretrained(folder)


def test_a_decoder_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    edit_json(folder, is_causal=False)
    with pytest.raises(ModelError, match="is_causal=False is not supported"):
        Engine.from_pretrained(folder)
