"""Which models are taken, and what is said of the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, OlmoConfig, PreTrainedConfig

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig, dtype_name, resolve_dtype
from tests.models import FAMILIES, tiny_config, tiny_engine
from tests.multimodal import omni_config


@pytest.mark.parametrize("config", [GPT2Config(), OlmoConfig()], ids=lambda config: config.model_type)
def test_another_family_is_named_with_what_is_supported(config: PreTrainedConfig) -> None:
    with pytest.raises(
        ModelError, match=f"'{config.model_type}' is not supported; supported are llama, mistral.*docs/families.md"
    ):
        ModelConfig.from_hf(config)


def test_another_family_in_a_folder_is_refused_before_its_weights_are_looked_for(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="model family 'gpt2' is not supported"):
        tiny_engine(module=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: silu, swish, gelu_pytorch_tanh"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type 'dynamic' is not supported; supported are default, linear, llama3, yarn",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported",
        ),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
    ],
)
def test_a_variant_that_is_not_supported_is_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig.from_hf(tiny_config("llama", **overrides))


def test_queries_that_grow_by_a_length_that_is_not_there_are_refused() -> None:
    config = tiny_config("ministral3")
    del config.rope_parameters["original_max_position_embeddings"]
    with pytest.raises(
        ModelError, match=r"llama_4_scaling_beta=0.4 counts positions in original_max_position_embeddings"
    ):
        ModelConfig.from_hf(config)


def test_irregularities_of_the_families_are_absorbed() -> None:
    configs = {family: ModelConfig.from_hf(tiny_config(family)) for family in FAMILIES}
    assert configs["llama"].sliding_windows == (None,) * 4
    assert configs["mistral with a sliding window"].sliding_windows == (12,) * 4
    assert configs["qwen2 with sliding layers"].sliding_windows == (None, None, 12, 12)
    assert configs["qwen3 with sliding layers and bias"].sliding_windows == (None, 12, 12, 12)
    assert [family for family, config in configs.items() if config.qk_norm] == [
        family for family in FAMILIES if any(name in family for name in ("qwen3", "gemma3", "olmo"))
    ]
    assert [family for family, config in configs.items() if not config.input_norms] == [
        family for family in FAMILIES if "olmo" in family
    ]
    assert configs["phi3 with partial rotary"].rotary_pairs == 7
    assert configs["ministral3"].query_scale_beta == 0.4
    assert (configs["gemma2"].attention_softcap, configs["gemma2"].logits_softcap) == (2.0, 3.0)
    assert configs["gemma3_text"].sliding_windows == (12, 12, 12, 12, 12, None, 12)
    assert configs["gemma3_text"].second_rope_layers == (True, True, True, True, True, False, True)
    assert configs["gemma3_text"].embed_scale_in(torch.bfloat16) == 6.3125 != configs["gemma3_text"].embed_scale
    assert configs["smollm3"].second_rope_layers == (False, True, False, True)
    assert configs["granite"].changes_branches
    assert not configs["granite"].branch_norms
    assert configs["qwen2"].qkv_bias
    assert not configs["qwen2"].o_proj_bias
    assert configs["llama with attention bias"].o_proj_bias
    assert configs["qwen3"].head_dim == 20
    assert configs["qwen3"].attention_size == 80 != configs["qwen3"].hidden_size


def test_bytes_of_a_step_are_those_of_the_published_shapes() -> None:
    """Llama-3-8B: 8.03 billion parameters, of which one step reads all but the embedding; 128 KiB of cache a token."""
    config = ModelConfig.from_hf(
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=8192,
        )
    )
    assert config.decode_weight_bytes(torch.bfloat16) == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=1e-3)
    assert config.kv_bytes(1, torch.bfloat16) == 128 * 1024
    assert 32 * config.ffn_bytes(torch.bfloat16) / config.decode_weight_bytes(torch.bfloat16) == pytest.approx(
        0.751, abs=0.001
    )


def test_cache_bytes_respect_windows() -> None:
    config = ModelConfig.from_hf(tiny_config("qwen2 with sliding layers"))
    assert config.kv_bytes(100, torch.float32) == 2 * (100 + 100 + 12 + 12) * 2 * 10 * 4
    assert config.kv_bytes(5, torch.float32) == 2 * 4 * 5 * 2 * 10 * 4


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("float32", torch.float32),
    ],
)
def test_dtypes_go_by_any_of_their_names(given: str | torch.dtype, expected: torch.dtype) -> None:
    assert resolve_dtype(given) == expected
    assert resolve_dtype(dtype_name(expected)) == expected


@pytest.mark.parametrize("dtype", ["fp8", "int8", torch.float64])
def test_another_dtype_is_refused(dtype: str | torch.dtype) -> None:
    with pytest.raises(ModelError, match="use one of fp32, bf16, fp16"):
        resolve_dtype(dtype)


def test_each_channel_pair_turns_by_one_of_three_positions() -> None:
    assert ModelConfig.from_hf(tiny_config("qwen2")).position_axes is None
    config = ModelConfig.from_hf(omni_config().get_text_config())
    assert config.position_axes == (0, 1, 1, 2, 2)
    assert config.qkv_bias
    assert hash(config) == hash(ModelConfig.from_hf(omni_config().get_text_config()))
