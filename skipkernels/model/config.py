"""ModelConfig: what the decode program needs to know of a model. Every irregularity of a family is absorbed here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

import torch

from skipkernels.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen2_5_omni_text")
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """The project's short name of a weight dtype: fp32, bf16 or fp16."""
    for name, value in DTYPES.items():
        if value == dtype:
            return name
    raise ModelError(f"dtype {dtype} is not supported; use one of {', '.join(DTYPES)}")


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Accepts the short name (``"bf16"``), torch's name (``"bfloat16"``) or the torch dtype itself."""
    if isinstance(dtype, torch.dtype):
        return DTYPES[dtype_name(dtype)]
    name = str(dtype).removeprefix("torch.")
    name = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and variants of one decoder, with Hugging Face's names.

    ``sliding_windows`` holds one entry per layer: the window in tokens (the current one included), or None for full
    attention. ``rope_parameters`` is Hugging Face's dictionary as a sorted tuple of pairs: hashable like the rest.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_proj_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    rope_parameters: tuple[tuple[str, object], ...]

    @classmethod
    def from_hf(cls, config: PreTrainedConfig) -> ModelConfig:
        """Reads a ``transformers`` configuration.

        Raises:
            ModelError: the family, activation or rotary variant is not supported; the message says which are.
        """
        family = config.model_type
        if family not in SUPPORTED_FAMILIES:
            raise ModelError(
                f"model family {family!r} is not supported; supported are {', '.join(SUPPORTED_FAMILIES)} "
                "(dense decoders with a gated SiLU FFN)"
            )
        activation = config.hidden_act
        if activation not in ("silu", "swish"):
            raise ModelError(f"{family}: hidden_act={activation!r} is not supported; supported is 'silu'")
        if getattr(config, "mlp_bias", False):
            raise ModelError(f"{family}: mlp_bias=True is not supported; the FFN kernels have no bias")
        rope = dict(config.rope_parameters)
        if rope["rope_type"] not in SUPPORTED_ROPE_TYPES:
            raise ModelError(
                f"{family}: rope_type {rope['rope_type']!r} is not supported; "
                f"supported are {', '.join(SUPPORTED_ROPE_TYPES)}"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(
                f"{family}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported; only 1.0"
            )
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if heads % kv_heads:
            raise ModelError(f"{family}: {heads} attention heads are not a multiple of {kv_heads} key/value heads")
        if head_dim % 2:
            raise ModelError(f"{family}: head_dim must be even for rotary embeddings, got {head_dim}")
        attention_bias = bool(getattr(config, "attention_bias", False))
        return cls(
            model_type=family,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=attention_bias or family in ("qwen2", "qwen2_5_omni_text"),
            o_proj_bias=attention_bias,
            qk_norm=family == "qwen3",
            sliding_windows=_sliding_windows(config),
            rope_parameters=tuple(sorted((name, _hashable(value)) for name, value in rope.items())),
        )

    @property
    def position_axes(self) -> tuple[int, ...] | None:
        """Which of a token's positions in time (0), height (1) and width (2) rotates each pair of channels; None where
        a token has one position (M-RoPE: Qwen2-VL, arXiv 2409.12191)."""
        sections = cast("tuple[int, ...] | None", dict(self.rope_parameters).get("mrope_section"))
        return sections and tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))

    @property
    def qkv_size(self) -> int:
        """Rows of the packed q/k/v projection."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def attention_size(self) -> int:
        """Width of the attention output before ``o_proj``; Qwen3 has it independent of ``hidden_size``."""
        return self.num_attention_heads * self.head_dim

    def attention_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one layer's attention matrices."""
        return (self.qkv_size + self.attention_size) * self.hidden_size * dtype.itemsize

    def ffn_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one layer's FFN matrices: what one skipped FFN does not read."""
        return 3 * self.intermediate_size * self.hidden_size * dtype.itemsize

    def decode_weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of weights one dense decode step reads: every layer, lm_head, and one embedding row."""
        per_layer = self.attention_bytes(dtype) + self.ffn_bytes(dtype)
        head = (self.vocab_size + 1) * self.hidden_size * dtype.itemsize
        return self.num_hidden_layers * per_layer + head

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all matrices."""
        per_layer = self.attention_bytes(dtype) + self.ffn_bytes(dtype)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size * dtype.itemsize
        return self.num_hidden_layers * per_layer + embeddings

    def cache_bytes(self, batch_size: int, max_seq_len: int, dtype: torch.dtype) -> int:
        """Bytes of a KV cache; sliding layers keep every position too."""
        per_position = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype.itemsize
        return batch_size * max_seq_len * per_position

    def kv_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        """Bytes of cached keys and values one row reads to attend over ``seq_len`` positions, windows respected."""
        positions = sum(min(seq_len, window or seq_len) for window in self.sliding_windows)
        return 2 * positions * self.num_key_value_heads * self.head_dim * dtype.itemsize

    def architecture_hash(self) -> str:
        """Twelve hex digits over every field; part of the fingerprint that binds a policy file to a model."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _sliding_windows(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """One window per layer: ``layer_types`` decides where the family has it, else one window holds for all."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return (window,) * config.num_hidden_layers
    known = {"full_attention": None, "sliding_attention": window}
    for kind in layer_types:
        if kind not in known:
            raise ModelError(
                f"{config.model_type}: layer type {kind!r} is not supported; supported: {', '.join(known)}"
            )
    return tuple(known[kind] for kind in layer_types)
