"""What a GGUF file says of a Hugging Face checkpoint beside its weights: the way back from ``gguf_config``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import torch

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig
from skipkernels.model.rope import rope_frequencies, unscaled_frequencies

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ARCHITECTURE_OF = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
"""Hugging Face's name of a family -> GGUF's of an architecture that computes the same."""


def architecture_of(config: ModelConfig, source: str) -> str:
    """
    Raises:
        ModelError: GGUF has no architecture that computes what this model does.
    """
    if config.model_type not in ARCHITECTURE_OF:
        raise ModelError(
            f"{source}: a model of family {config.model_type!r} cannot be written as a GGUF file; "
            f"these can: {', '.join(ARCHITECTURE_OF)}"
        )
    if any(window is not None for window in config.sliding_windows):
        raise ModelError(f"{source}: its sliding windows cannot be written: GGUF's {config.model_type} has none")
    if config.num_experts and not (all(config.expert_layers) and config.norm_topk_prob):
        raise ModelError(
            f"{source}: cannot be written: in GGUF's {config.model_type} every layer has experts, and the shares of "
            "those chosen sum to 1"
        )
    return ARCHITECTURE_OF[config.model_type]


def add_sizes(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Sizes, norms and rotary parameters."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    if config.num_experts:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope: dict[str, Any] = dict(config.rope_parameters)
    writer.add_rope_dimension_count(int(config.head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if (kind := rope.get("rope_type", "default")) in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        length = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(int(length))
        for name, add in (
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(name) is not None:
                add(float(rope[name]))


def rope_factors(hf_config: PreTrainedConfig, config: ModelConfig) -> torch.Tensor | None:
    """By what Llama 3's scaling divides each rotary frequency [head_dim / 2], fp32; None: there is none."""
    rope: dict[str, Any] = dict(config.rope_parameters)
    if rope.get("rope_type") != "llama3":
        return None
    scaled, _ = rope_frequencies(hf_config, config.max_position_embeddings)
    return unscaled_frequencies(hf_config) / scaled
