"""What a GGUF file's tensors become: Hugging Face's order of rows, every format, as the gguf package dequantises."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from skipkernels import Engine
from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig
from skipkernels.model.gguf_config import end_tokens, hf_config
from skipkernels.model.gguf_file import GgufFile
from skipkernels.model.weights import parameter_views
from tests.gguf_files import read_back, write_gguf
from tests.models import random_prompt, stock_tokens, tiny_module

NATIVE = [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K, Type.Q6_K]
DEQUANTISED = [Type.Q2_K, Type.Q3_K, Type.IQ4_NL, Type.IQ4_XS, Type.MXFP4]
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
PROMPT = random_prompt(9)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama with one kv head", {"tie_word_embeddings": True}),
        ("llama with attention bias", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_architectures_decode_as_transformers(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    module = tiny_module(family, **overrides)
    engine = Engine.from_pretrained(write_gguf(tmp_path / "model.gguf", module), num_threads=1)
    assert engine.dtype == "fp32"
    assert engine.config == Engine.from_pretrained(tiny_module(family, **overrides)).config
    (answer,) = engine.generate([PROMPT], max_new_tokens=24, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(module, PROMPT, 24)


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
def test_rotary_scaling(tmp_path: Path, rope: str) -> None:
    module = tiny_module(f"llama with {rope} rope")
    metadata: dict[str, Any] = {"llama.rope.scaling.type": rope, "llama.rope.scaling.factor": 4.0}
    if rope == "yarn":
        metadata["llama.rope.scaling.original_context_length"] = 128
    path = tmp_path / "model.gguf"
    if rope == "llama3":
        rotary, plain = module.model.rotary_emb, tiny_module("llama").model.rotary_emb
        module.register_buffer("rope_freqs", plain.inv_freq / rotary.inv_freq)
        metadata = {}
    write_gguf(path, module, **metadata)
    prompt = random_prompt(80)
    (answer,) = Engine.from_pretrained(path, num_threads=1).generate([prompt], max_new_tokens=24, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(module, prompt, 24)
    assert answer.token_ids != stock_tokens(tiny_module("llama"), prompt, 24)


@pytest.mark.parametrize(
    ("family", "changes", "metadata"),
    [
        ("gemma2", {"query_pre_attn_scalar": 14}, {}),
        ("olmo2", {}, {}),
        (
            "olmo3",
            {"num_hidden_layers": 5},
            {
                "olmo2.rope.scaling.type": "yarn",
                "olmo2.rope.scaling.factor": 4.0,
                "olmo2.rope.scaling.original_context_length": 128,
            },
        ),
    ],
)
def test_other_architectures_decode_as_transformers(
    tmp_path: Path, family: str, changes: dict[str, Any], metadata: dict[str, Any]
) -> None:
    module = tiny_module(family, **changes)
    engine = Engine.from_pretrained(
        write_gguf(tmp_path / "model.gguf", module, **metadata), dtype="fp32", num_threads=1
    )
    assert engine.config == ModelConfig.from_hf(module.config)
    (answer,) = engine.generate([PROMPT], max_new_tokens=64, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(module, PROMPT, 64)


def test_gemma3_decodes_as_transformers(tmp_path: Path) -> None:
    """Files say neither which layers slide nor how these rotate, and their norms hold 1 + weight."""
    module = tiny_module("gemma3_text", query_pre_attn_scalar=20)
    metadata = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    engine = Engine.from_pretrained(write_gguf(tmp_path / "model.gguf", module, **metadata), num_threads=1)
    assert engine.config == Engine.from_pretrained(tiny_module("gemma3_text", query_pre_attn_scalar=20)).config
    prompt = random_prompt(21)
    (answer,) = engine.generate([prompt], max_new_tokens=64, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(module, prompt, 64)


@pytest.mark.parametrize(
    ("pattern", "sliding"), [(3, [0, 1, 3, 4, 6]), ([True, False, False, True, False, False, False], [0, 3])]
)
def test_gemma3_s_sliding_layers_may_be_named(tmp_path: Path, pattern: Any, sliding: list[int]) -> None:
    metadata = {"gemma3.attention.sliding_window_pattern": pattern}
    file = GgufFile(write_gguf(tmp_path / "model.gguf", tiny_module("gemma3_text"), **metadata))
    kinds = hf_config(file).layer_types
    assert [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"] == sliding


def test_gemma3_s_score_scaling_is_llama_cpp_s(tmp_path: Path) -> None:
    """By the size of a head, in the 27B model (62 layers) by hidden_size / num_attention_heads."""
    for layers, expected in ((7, 20), (62, 10)):
        file = GgufFile(write_gguf(tmp_path / f"{layers}.gguf", tiny_module("gemma3_text", num_hidden_layers=layers)))
        assert hf_config(file).query_pre_attn_scalar == expected


def test_soft_capping_in_a_file_is_refused(tmp_path: Path) -> None:
    metadata = {"gemma3.final_logit_softcapping": 30.0}
    with pytest.raises(ModelError, match=r"final_logit_softcapping=30\.0 is not supported"):
        Engine.from_pretrained(write_gguf(tmp_path / "model.gguf", tiny_module("gemma3_text"), **metadata))


@pytest.mark.parametrize("kind", [*NATIVE, *DEQUANTISED, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_every_format_holds_what_the_package_makes_of_it(tmp_path: Path, kind: Type, caplog: Any) -> None:
    """Bit for bit, in the file's format and as fp32; formats without kernels are named."""
    module = tiny_module("llama", **WIDE)
    path = write_gguf(tmp_path / "model.gguf", module, kind)
    expected = dict(read_back(path, module).named_parameters())
    floats = Engine.from_pretrained(path, dtype="fp32", num_threads=1)
    views = parameter_views(floats.config, floats.weights)
    for name, parameter in expected.items():
        assert torch.equal(views[name], parameter), name
    own = Engine.from_pretrained(path, executor="reference").weights
    layer, prefix = own.layers[1], "model.layers.1."
    qkv = torch.cat([expected[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"])
    for matrix, values in ((layer.qkv_proj, qkv), (layer.down_proj, expected[prefix + "mlp.down_proj.weight"])):
        if kind in NATIVE:
            assert {part.format for part in matrix.parts} == {kind.name.lower()}  # type: ignore[union-attr]
            assert torch.equal(matrix.dequantize(), values)  # type: ignore[union-attr]
        else:
            dtype = torch.float16 if kind is Type.F16 else torch.bfloat16
            assert torch.equal(matrix, values.to(dtype))  # type: ignore[arg-type]
    assert (f"no CPU kernels read {kind.name}; 16 matrices are dequantised" in caplog.text) == (kind in DEQUANTISED)
    assert own.fingerprint(floats.config) == floats.fingerprint


def test_mixed_formats_decode_as_their_weights_dequantised(tmp_path: Path, caplog: Any) -> None:
    """As in Q4_K_M: v_proj and down_proj in another format than the rest, norms in floats."""
    module = tiny_module("llama", **WIDE)
    special = {"attn_v": Type.Q6_K, "ffn_down": Type.Q6_K, "ffn_up": Type.F16, "token_embd": Type.Q8_0}
    path = write_gguf(tmp_path / "model.gguf", module, Type.Q4_K, special)
    engine = Engine.from_pretrained(path, num_threads=1)
    layer = engine.weights.layers[0]
    assert [part.format for part in layer.qkv_proj.parts] == ["q4_k", "q4_k", "q6_k"]  # type: ignore[union-attr]
    assert isinstance(layer.gate_up_proj, torch.Tensor)  # q4_k on top of floats: floats
    assert "2 matrices in Q4_K are dequantised to fp16: they are stacked with floats" in caplog.text
    expected = dict(read_back(path, module).named_parameters())
    qkv = torch.cat([expected[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(layer.qkv_proj.dequantize(), qkv)  # type: ignore[union-attr]
    assert len(engine.generate([PROMPT], max_new_tokens=12, eos_token_ids=[])[0].token_ids) == 12
    floats = Engine.from_pretrained(path, dtype="fp32", num_threads=1)
    (answer,) = floats.generate([PROMPT], max_new_tokens=24, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(module, PROMPT, 24)


def test_a_policy_of_another_model_is_refused(tmp_path: Path) -> None:
    module = tiny_module("llama")
    one = Engine.from_pretrained(write_gguf(tmp_path / "one.gguf", module))
    same = Engine.from_pretrained(write_gguf(tmp_path / "same.gguf", module), dtype="bf16")
    other = Engine.from_pretrained(write_gguf(tmp_path / "other.gguf", tiny_module("llama", seed=1)))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_several_ends_of_sequence(tmp_path: Path) -> None:
    tokens = ["a"] * 257 + ["<|im_end|>", "<|endoftext|>"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3],
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.eot_token_id": 4,
    }
    file = GgufFile(write_gguf(tmp_path / "model.gguf", tiny_module("llama"), **metadata))
    assert end_tokens(file) == [257, 4, 258]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_used_count is missing"),
        ({"llama.attention.value_length": 6}, "keys of 10 and values of 6 channels"),
        ({"llama.rope.scaling.type": "linear"}, "llama.rope.scaling.factor is missing"),
        ({"llama.rope.freq_base": "many"}, "llama.rope.freq_base must be one number, got 'many'"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "tokenizer.ggml.eos_token_id must be an integer, got '</s>'"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    module = tiny_module("llama")
    path = tmp_path / "model.gguf"
    with pytest.MonkeyPatch.context() as patch:
        add = gguf.GGUFWriter.add_key_value
        patch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda self, value: None)
        patch.setattr(gguf.GGUFWriter, "add_key_value", lambda self, key, *rest, **more: add(self, key, *rest, **more))
        write_gguf(path, module, **metadata)
    with pytest.raises(ModelError, match=message):
        hf_config(GgufFile(path))
