"""Published model shapes, for timing on random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipkernels.errors import RequestError

if TYPE_CHECKING:
    from transformers import LlamaConfig


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False
) -> dict[str, int | bool]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, int | bool]] = {
    "smollm2-135m": _shape(576, 1536, 30, 9, 3, 49152, tied=True),
    "tinyllama-1.1b": _shape(2048, 5632, 22, 32, 4, 32000),
    "llama-3.2-1b": _shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "llama-3.2-3b": _shape(3072, 8192, 28, 24, 8, 128256, tied=True),
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8, 128256),
}


def shape_config(name: str, max_seq_len: int) -> LlamaConfig:
    """A Llama configuration of the named shape without end-of-sequence token, so that it decodes as long as asked."""
    from transformers import LlamaConfig

    if name not in SHAPES:
        raise RequestError(f"unknown shapes {name!r}; known are {', '.join(SHAPES)}")
    sizes: dict[str, Any] = dict(SHAPES[name])
    return LlamaConfig(**sizes, max_position_embeddings=max_seq_len, bos_token_id=None, eos_token_id=None)
