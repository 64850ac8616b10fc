"""Published model shapes, for timing on random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipkernels.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _shape(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    tied: bool = False,
    family: str = "llama",
    **others: Any,
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        **others,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "tinyllama-1.1b": _shape(2048, 5632, 22, 32, 4, 32000),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, 8, 128256, tied=True),
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8, 128256),
    "gemma-3-1b": _shape(1152, 6912, 26, 4, 1, 262144, tied=True, family="gemma3_text", head_dim=256),
    # layers of Qwen3-30B-A3B, which has 48 of them, 128 experts in each and a vocabulary of 151,936
    "qwen3-moe-2b": _shape(
        2048,
        6144,
        6,
        32,
        4,
        32000,
        family="qwen3_moe",
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    ),
}


def shape_config(name: str, max_seq_len: int) -> PreTrainedConfig:
    """A configuration of the named shape without end-of-sequence token, so that it decodes as long as asked."""
    from transformers import AutoConfig

    if name not in SHAPES:
        raise RequestError(f"unknown shapes {name!r}; known are {', '.join(SHAPES)}")
    sizes: dict[str, Any] = dict(SHAPES[name])
    family = sizes.pop("model_type", "llama")
    return AutoConfig.for_model(
        family, **sizes, max_position_embeddings=max_seq_len, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
