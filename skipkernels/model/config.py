"""ModelConfig: what the decode program needs to know of a model. Every irregularity of a family is absorbed here."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from skipkernels.errors import ModelError, RequestError
from skipkernels.model.family import FAMILIES, Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
ACTIVATIONS = ("silu", "gelu_tanh", "clamped_swiglu")
"""Of the FFN's gate, in the order of the instruction set's numbers."""
GATE_SLOPE, GATE_LIMIT = 1.702, 7.0
"""Of clamped_swiglu (gpt-oss)."""
_ACTIVATION_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
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
    activation: str = "silu"  # one of ACTIVATIONS
    branch_norms: bool = False  # attention and FFN are normed once more before they are added
    norm_offset: float = 0.0  # what is added to the weights of norms
    attention_scaling: float | None = None  # None: 1 / sqrt(head_dim)
    embed_scale: float = 1.0
    rounds_embed_scale: bool = False
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    second_rope_parameters: tuple[tuple[str, object], ...] = ()  # of some layers; none there: they do not rotate
    second_rope_layers: tuple[bool, ...] = ()  # which; none: all layers rotate alike
    num_experts: int = 0  # of each of expert_layers
    num_experts_per_tok: int = 0  # that a token's router chooses
    moe_intermediate_size: int = 0  # of one expert
    norm_topk_prob: bool = False  # the chosen experts' shares sum to 1
    expert_layers: tuple[bool, ...] = ()  # which have a router and experts; none: all FFNs are dense
    norms_whole_qk: bool = False  # qk_norm is of all heads together
    input_norms: bool = True  # what attention and FFN read is normed
    partial_rotary_factor: float = 1.0  # the share of a head's channels that are rotated
    query_scale_beta: float = 0.0  # queries grow with their position: Ministral 3
    attention_softcap: float = 0.0  # of scores; 0: none
    logits_softcap: float = 0.0
    attention_sinks: bool = False  # every head has one more score, of a position without a value: gpt-oss
    expert_biases: bool = False  # of routers and experts

    @classmethod
    def from_hf(cls, config: PreTrainedConfig) -> ModelConfig:
        """Reads a ``transformers`` configuration.

        Raises:
            ModelError: the family, activation or rotary variant is not supported; the message says which are.
        """
        kind = family_of(config)
        family = kind.name
        if getattr(config, "is_causal", True) is False:
            raise ModelError(f"{family}: is_causal=False is not supported; a decoder attends to earlier tokens only")
        for entry in kind.must_be_off:
            if value := getattr(config, entry, None):
                raise ModelError(f"{family}: {entry}={value} is not supported; the kernels do without")
        activation = getattr(config, kind.activation)
        if activation not in _ACTIVATION_NAMES:
            known = ", ".join(_ACTIVATION_NAMES)
            raise ModelError(f"{family}: {kind.activation}={activation!r} is not supported; supported: {known}")
        if kind.reads_mlp_bias and config.mlp_bias:
            raise ModelError(f"{family}: mlp_bias=True is not supported; the FFN kernels have no bias")
        if kind.clamps_gates and (config.swiglu_alpha, config.swiglu_limit) != (GATE_SLOPE, GATE_LIMIT):
            got = f"swiglu_alpha={config.swiglu_alpha} and swiglu_limit={config.swiglu_limit}"
            raise ModelError(f"{family}: {got} are not supported; the kernels have {GATE_SLOPE} and {GATE_LIMIT}")
        rope, second_rope = _rope_parameters(config, kind)
        heads = _size(config, "num_attention_heads")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        if heads % kv_heads:
            raise ModelError(f"{family}: {heads} attention heads are not a multiple of {kv_heads} key/value heads")
        if head_dim < 2 or head_dim % 2:
            raise ModelError(f"{family}: head_dim must be even for rotary embeddings, got {head_dim}")
        if not (math.isfinite(config.rms_norm_eps) and config.rms_norm_eps >= 0):
            raise ModelError(f"{family}: rms_norm_eps must be a finite number of at least 0, got {config.rms_norm_eps}")
        attention_bias = kind.attention_bias == "read" and bool(config.attention_bias)
        return cls(
            model_type=family,
            hidden_size=_size(config, "hidden_size"),
            intermediate_size=_size(config, "intermediate_size"),
            num_hidden_layers=_size(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_size(config, "vocab_size"),
            max_position_embeddings=_size(config, "max_position_embeddings"),
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=bool(config.tie_word_embeddings),
            qkv_bias=attention_bias or kind.attention_bias == "qkv",
            o_proj_bias=attention_bias,
            qk_norm=kind.qk_norm != "none",
            norms_whole_qk=kind.qk_norm == "whole",
            input_norms=kind.input_norms,
            partial_rotary_factor=float(cast(float, rope.get("partial_rotary_factor", 1.0))),
            query_scale_beta=_query_scale_beta(kind, rope),
            attention_softcap=_softcap(config, kind, "attn_logit_softcapping"),
            logits_softcap=_softcap(config, kind, "final_logit_softcapping"),
            sliding_windows=_sliding_windows(config, kind),
            rope_parameters=_hashable_rope(rope),
            activation="clamped_swiglu" if kind.clamps_gates else _ACTIVATION_NAMES[activation],
            attention_sinks=kind.sinks,
            branch_norms=kind.branch_norms,
            norm_offset=kind.norm_offset,
            attention_scaling=_unless(head_dim**-0.5, kind.scaling(config)),
            embed_scale=kind.embed_scale(config),
            rounds_embed_scale=kind.rounds_embed_scale,
            residual_multiplier=kind.residual_multiplier(config),
            logits_multiplier=kind.logits_multiplier(config),
            second_rope_parameters=_hashable_rope(second_rope),
            second_rope_layers=_second_rope_layers(config, kind),
            **_experts(config, kind),
        )

    @property
    def scaling(self) -> float:
        """Of attention's scores."""
        return self.head_dim**-0.5 if self.attention_scaling is None else self.attention_scaling

    @property
    def rotary_pairs(self) -> int:
        """Pairs of a head's channels that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor) // 2

    @property
    def changes_branches(self) -> bool:
        """Whether what attention and FFN give is changed as a whole before it is added to the residual stream."""
        return self.branch_norms or self.residual_multiplier != 1.0

    def embed_scale_in(self, dtype: torch.dtype) -> float:
        """The factor of embeddings, as transformers has it in a model of ``dtype``."""
        return float(torch.tensor(self.embed_scale, dtype=dtype)) if self.rounds_embed_scale else self.embed_scale

    @property
    def position_axes(self) -> tuple[int, ...] | None:
        """Which of a token's positions in time (0), height (1) and width (2) rotates each pair of channels; None where
        a token has one position (M-RoPE: Qwen2-VL, arXiv 2409.12191)."""
        if self.model_type not in FAMILIES or not FAMILIES[self.model_type].three_axes:
            return None
        sections = cast("tuple[int, ...] | None", dict(self.rope_parameters).get("mrope_section"))
        return sections and tuple(axis for axis, pairs in enumerate(sections) for _ in range(pairs))

    @property
    def reach(self) -> int:
        """Positions that the model was made for: those of its configuration, or more where its rotary embeddings are
        stretched. Farther ones can be computed, but were never trained."""
        rope = dict(self.rope_parameters)
        if rope["rope_type"] == "longrope":  # beyond, all frequencies change, also those of what is cached
            return min(self.max_position_embeddings, cast(int, rope["original_max_position_embeddings"]))
        if rope["rope_type"] not in ("linear", "yarn"):
            return self.max_position_embeddings
        original = rope.get("original_max_position_embeddings") or self.max_position_embeddings
        return max(self.max_position_embeddings, int(cast(float, rope["factor"]) * cast(int, original)))

    def check_length(self, max_seq_len: int) -> None:
        """Raises RequestError for a number of positions that the model cannot have; warns of one it was not made for.
        Under linear and yarn scaling there is no end, as in transformers."""
        endless = dict(self.rope_parameters)["rope_type"] in ("linear", "yarn")
        if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, int):
            raise RequestError(f"max_seq_len must be an integer, got {max_seq_len!r}")
        if max_seq_len < 1 or (max_seq_len > self.reach and not endless):
            raise RequestError(f"max_seq_len must lie in 1..{self.reach} (the model's maximum), got {max_seq_len}")
        if max_seq_len > self.reach:
            logger.warning(
                "max_seq_len=%d is more than the %d positions the model was made for", max_seq_len, self.reach
            )

    @property
    def qkv_size(self) -> int:
        """Rows of the packed q/k/v projection."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def attention_size(self) -> int:
        """Width of the attention output before ``o_proj``; Qwen3 has it independent of ``hidden_size``."""
        return self.num_attention_heads * self.head_dim

    def has_experts(self, layer: int) -> bool:
        return bool(self.expert_layers) and self.expert_layers[layer]

    def neurons_of(self, layer: int) -> int:
        """Neurons of a token's FFN; with experts, of those that its router chooses together."""
        if self.has_experts(layer):
            return self.num_experts_per_tok * self.moe_intermediate_size
        return self.intermediate_size

    @property
    def scaled_neurons(self) -> int | None:
        """Neurons of an FFN, each of which a policy may give a scale; None: with experts a policy has no scales."""
        return None if self.num_experts else self.intermediate_size

    def attention_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one layer's attention matrices."""
        return (self.qkv_size + self.attention_size) * self.hidden_size * dtype.itemsize

    def ffn_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one layer's FFN matrices that a token reads, in the mean over layers: what one skipped FFN does not
        read. Of experts, those that the token's router chooses."""
        return self._ffn_bytes(self.num_experts_per_tok, dtype)

    def _ffn_bytes(self, experts: int, dtype: torch.dtype) -> int:
        sparse = sum(self.expert_layers)
        dense = self.num_hidden_layers - sparse
        elements = dense * 3 * self.intermediate_size + sparse * (3 * experts * self.moe_intermediate_size)
        elements += sparse * self.num_experts  # the routers
        return elements * self.hidden_size * dtype.itemsize // self.num_hidden_layers

    def decode_weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of weights one dense decode step reads: every layer, lm_head, and one embedding row."""
        per_layer = self.attention_bytes(dtype) + self.ffn_bytes(dtype)
        head = (self.vocab_size + 1) * self.hidden_size * dtype.itemsize
        return self.num_hidden_layers * per_layer + head

    def weight_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of all matrices."""
        per_layer = self.attention_bytes(dtype) + self._ffn_bytes(self.num_experts, dtype)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size * dtype.itemsize
        return self.num_hidden_layers * per_layer + embeddings

    def with_layers(self, kept: Sequence[int]) -> ModelConfig:
        """Of a model that has these layers alone."""
        per_layer = ("sliding_windows", "second_rope_layers", "expert_layers")
        cut: dict[str, Any] = {
            name: tuple(values[layer] for layer in kept) for name in per_layer if (values := getattr(self, name))
        }
        return replace(self, num_hidden_layers=len(kept), **cut)

    def cache_bytes(self, batch_size: int, max_seq_len: int, dtype: torch.dtype) -> int:
        """Bytes of a KV cache; sliding layers keep every position too."""
        per_position = 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype.itemsize
        return batch_size * max_seq_len * per_position

    def kv_bytes(self, seq_len: int, dtype: torch.dtype) -> int:
        """Bytes of cached keys and values one row reads to attend over ``seq_len`` positions, windows respected."""
        positions = sum(min(seq_len, window or seq_len) for window in self.sliding_windows)
        return 2 * positions * self.num_key_value_heads * self.head_dim * dtype.itemsize

    def architecture_hash(self) -> str:
        """Twelve hex digits over every field; part of the fingerprint that binds a policy file to a model. A field with
        a default came later: at the default it does not count, so that older files stay bound to their models."""
        defaults = {item.name: item.default for item in fields(self)}
        told = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _hashable_rope(rope: Mapping[str, object]) -> tuple[tuple[str, object], ...]:
    return tuple(sorted((name, _hashable(value)) for name, value in rope.items()))


def _unless(usual: float, value: float) -> float | None:
    return None if value == usual else value


def _hashable(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def quantization_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a configuration, or that of its text model, says of quantised weights; None: they are floats."""
    for part in (config, config.get_text_config(decoder=True)):
        for entry in ("quantization_config", "compression_config"):
            if (found := getattr(part, entry, None)) is not None:
                return found if isinstance(found, dict) else dict(vars(found))
    return None


def _size(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{config.model_type}: {name} must be an integer of at least 1, got {value!r}")
    return value


def rope_by_kind(config: PreTrainedConfig, kind: Family) -> dict[str | None, dict[str, object]]:
    """Rotary parameters as transformers names them: by type of layer, or one set under None. The first is that of
    layers with full attention."""
    rope = dict(config.rope_parameters or {})
    if not kind.rope_by_type:
        return {None: rope}
    return {name: dict(rope.get(name) or {}) for name in ("full_attention", "sliding_attention")}


def _rope_parameters(config: PreTrainedConfig, kind: Family) -> tuple[dict[str, object], dict[str, object]]:
    """Of most layers, and of those of ``_second_rope_layers``."""
    checked = [_checked_rope(kind, rope) for rope in rope_by_kind(config, kind).values()]
    return checked[0], checked[1] if len(checked) > 1 else {}


def _second_rope_layers(config: PreTrainedConfig, kind: Family) -> tuple[bool, ...]:
    if kind.rope_by_type:
        return tuple(name == "sliding_attention" for name in config.layer_types)
    if not kind.layers_without_rope:
        return ()
    flags = tuple(not flag for flag in config.no_rope_layers)  # 0 stands for a layer without
    return flags if any(flags) else ()


def _checked_rope(kind: Family, rope: dict[str, object]) -> dict[str, object]:
    family = kind.name
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested or "rope_type" not in rope:
        raise ModelError(
            f"{family}: rotary parameters must be one set for all layers, got {', '.join(nested) or 'no rope_type'}"
        )
    if rope["rope_type"] not in SUPPORTED_ROPE_TYPES:
        raise ModelError(
            f"{family}: rope_type {rope['rope_type']!r} is not supported; "
            f"supported are {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    for name in ("rope_theta", "factor", "original_max_position_embeddings"):
        needed = {"factor": ("linear", "llama3", "yarn"), "original_max_position_embeddings": ("longrope",)}
        value = rope.get(name, None if rope["rope_type"] in needed.get(name, ()) else 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ModelError(f"{family}: {name} of the rotary parameters must be a positive number, got {value!r}")
    share = rope.get("partial_rotary_factor", 1.0)
    if not isinstance(share, int | float) or not 0 < share <= 1:
        raise ModelError(f"{family}: partial_rotary_factor must be above 0 and at most 1, got {share!r}")
    if share != 1.0 and not kind.rotates_partly:
        raise ModelError(f"{family}: partial_rotary_factor={share} is not supported; only 1.0")
    return rope


def _query_scale_beta(kind: Family, rope: Mapping[str, object]) -> float:
    """Of log(1 + floor(position / original length)), by which queries grow."""
    beta = rope.get("llama_4_scaling_beta") if kind.scales_queries else 0.0
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise ModelError(f"{kind.name}: llama_4_scaling_beta of the rotary parameters must be a number, got {beta!r}")
    if beta and rope.get("original_max_position_embeddings") is None:
        raise ModelError(
            f"{kind.name}: llama_4_scaling_beta={beta} counts positions in original_max_position_embeddings, which the "
            "rotary parameters lack"
        )
    return float(beta)


def _softcap(config: PreTrainedConfig, kind: Family, name: str) -> float:
    cap = (getattr(config, name, None) or 0.0) if kind.softcaps else 0.0
    if isinstance(cap, bool) or not isinstance(cap, int | float) or not 0 <= cap < math.inf:
        raise ModelError(f"{kind.name}: {name} must be a positive number or null, got {cap!r}")
    return float(cap)


def _experts(config: PreTrainedConfig, kind: Family) -> dict[str, Any]:
    """The fields of a mixture of experts; none of a dense model."""
    if kind.experts is None:
        return {}
    layers, dense = config.num_hidden_layers, getattr(config, "mlp_only_layers", None) or ()
    step = getattr(config, "decoder_sparse_step", 1)
    experts, chosen = _size(config, "num_experts"), _size(config, "num_experts_per_tok")
    if chosen > experts:
        raise ModelError(f"{kind.name}: num_experts_per_tok={chosen} is more than the {experts} experts")
    norm = kind.experts.norm_topk_prob
    return {
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": _size(config, kind.experts.intermediate_size),
        "norm_topk_prob": bool(config.norm_topk_prob) if norm is None else norm,
        "expert_biases": kind.experts.transposed,
        "expert_layers": tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers)),
    }


def _sliding_windows(config: PreTrainedConfig, kind: Family) -> tuple[int | None, ...]:
    """One window per layer, as the family's attention has it; entries that it does not read count for nothing."""
    family, layers = config.model_type, config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if kind.windows == "by type":
        windows = _windows_by_type(config, window)
    else:
        if window is not None and kind.windows == "none":
            logger.warning("%s has no sliding windows; sliding_window=%s is ignored", family, window)
        windows = (window if kind.windows == "one" else None,) * layers
    if any(size is not None and size < 1 for size in windows):
        raise ModelError(f"{family}: sliding_window must be at least 1, got {window}")
    return windows


def _windows_by_type(config: PreTrainedConfig, window: int | None) -> tuple[int | None, ...]:
    family, layers, kinds = config.model_type, config.num_hidden_layers, config.layer_types
    if len(kinds) < layers:
        raise ModelError(f"{family}: layer_types names {len(kinds)} layers, the model has {layers}")
    known = {"full_attention": None, "sliding_attention": window}
    for kind in kinds[:layers]:
        if kind not in known:
            raise ModelError(f"{family}: layer type {kind!r} is not supported; supported: {', '.join(known)}")
        if kind == "sliding_attention" and window is None:
            raise ModelError(f"{family}: layer_types has sliding_attention, but there is no sliding_window")
    return tuple(known[kind] for kind in kinds[:layers])
