"""Families of decoders as data: where a configuration of each says what ModelConfig holds, and what it always means.

``docs/families.md`` shows how one is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from skipkernels.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Number = Callable[["PreTrainedConfig"], float]


def _one(_: PreTrainedConfig) -> float:
    return 1.0


def _by_head_dim(config: PreTrainedConfig) -> float:
    return float((getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) ** -0.5)


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: each token's FFN is the few that a router chooses."""

    intermediate_size: str  # the entry that holds an expert's
    norm_topk_prob: bool | None  # chosen experts' shares are made to sum to 1; None: as `norm_topk_prob` says
    saved_router: str  # names in files, of a layer; transformers' module stacks the experts
    saved_gate: str = "mlp.experts.{}.gate_proj.weight"
    saved_up: str = "mlp.experts.{}.up_proj.weight"
    saved_down: str = "mlp.experts.{}.down_proj.weight"
    transposed: bool = False  # stacks are [experts, in, out], gate and up in alternate columns, and all have biases


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face. The defaults are Llama's, without what its configuration leaves open."""

    name: str
    attention_bias: Literal["never", "read", "qkv"] = "never"  # read: as `attention_bias` says, also of o_proj
    reads_mlp_bias: bool = False  # one that `mlp_bias` asks for is refused: the FFN kernels have none
    windows: Literal["none", "one", "by type"] = "none"  # by type: layers that `layer_types` calls sliding
    three_axes: bool = False  # positions in time, height and width (M-RoPE)
    qk_norm: Literal["none", "heads", "whole"] = "none"  # of q and k: of each head, or of all heads together
    activation: str = "hidden_act"  # the entry that names the gate's
    fused: bool = False  # q, k and v are one parameter, and so are gate and up
    clamps_gates: bool = False  # clamped_swiglu in place of the activation
    sinks: bool = False  # each head has one more score, of a position without a value
    input_norms: bool = True  # what attention and FFN read is normed
    branch_norms: bool = False  # attention and FFN are normed once more, as a whole, before they are added
    norm_offset: float = 0.0  # Gemma's norms multiply by 1 + weight
    rope_by_type: bool = False  # sliding and full layers have rotary parameters of their own
    experts: Experts | None = None  # of layers with a router
    rotates_partly: bool = False  # as `partial_rotary_factor` says
    layers_without_rope: bool = False  # those whose `no_rope_layers` is 0
    scaling: Number = _by_head_dim  # of scores
    embed_scale: Number = _one
    rounds_embed_scale: bool = False  # to the dtype of the embeddings
    residual_multiplier: Number = _one  # of what attention and FFN add
    logits_multiplier: Number = _one
    softcaps: bool = False  # of scores and logits, as `attn_logit_softcapping` and `final_logit_softcapping` say
    scales_queries: bool = False  # by their position, as `llama_4_scaling_beta` of the rotary parameters says
    must_be_off: tuple[str, ...] = ()  # entries that would change the model in ways the kernels do not know


def _by_query_scalar(config: PreTrainedConfig) -> float:
    return float(config.query_pre_attn_scalar**-0.5)


def _by_hidden_size(config: PreTrainedConfig) -> float:
    return math.sqrt(config.hidden_size)


def _granite(name: str) -> Number:
    return lambda config: float(getattr(config, name))


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", attention_bias="read", reads_mlp_bias=True),
        Family("mistral", windows="one"),
        Family("ministral", windows="by type"),
        Family("ministral3", windows="one", scales_queries=True),
        Family("qwen2", attention_bias="qkv", windows="by type"),
        Family("qwen3", attention_bias="read", windows="by type", qk_norm="heads"),
        Family(
            "qwen3_moe",
            attention_bias="read",
            windows="one",
            qk_norm="heads",
            experts=Experts(
                intermediate_size="moe_intermediate_size",
                norm_topk_prob=None,
                saved_router="mlp.gate.weight",
            ),
        ),
        Family(
            "mixtral",
            windows="one",
            experts=Experts(
                intermediate_size="intermediate_size",
                norm_topk_prob=True,
                saved_router="block_sparse_moe.gate.weight",
                saved_gate="block_sparse_moe.experts.{}.w1.weight",
                saved_up="block_sparse_moe.experts.{}.w3.weight",
                saved_down="block_sparse_moe.experts.{}.w2.weight",
            ),
        ),
        Family(
            "gpt_oss",
            attention_bias="read",
            windows="by type",
            clamps_gates=True,
            sinks=True,
            experts=Experts(
                intermediate_size="intermediate_size",
                norm_topk_prob=True,
                saved_router="mlp.router.weight",
                transposed=True,
            ),
        ),
        Family("phi3", windows="one", fused=True, rotates_partly=True),
        Family("qwen2_5_omni_text", attention_bias="qkv", windows="by type", three_axes=True),
        Family(
            "gemma3_text",
            attention_bias="read",
            windows="by type",
            qk_norm="heads",
            activation="hidden_activation",
            branch_norms=True,
            norm_offset=1.0,
            rope_by_type=True,
            scaling=_by_query_scalar,
            embed_scale=_by_hidden_size,
            rounds_embed_scale=True,
            must_be_off=("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"),
        ),
        Family(
            "gemma2",
            attention_bias="read",
            windows="by type",
            activation="hidden_activation",
            branch_norms=True,
            norm_offset=1.0,
            scaling=_by_query_scalar,
            embed_scale=_by_hidden_size,
            rounds_embed_scale=True,
            softcaps=True,
            must_be_off=("use_bidirectional_attention",),
        ),
        Family("olmo2", attention_bias="read", qk_norm="whole", input_norms=False, branch_norms=True),
        Family(
            "olmo3",
            attention_bias="read",
            windows="by type",
            qk_norm="whole",
            input_norms=False,
            branch_norms=True,
            rope_by_type=True,
        ),
        Family(
            "granite",
            attention_bias="read",
            reads_mlp_bias=True,
            scaling=_granite("attention_multiplier"),
            embed_scale=_granite("embedding_multiplier"),
            residual_multiplier=_granite("residual_multiplier"),
            logits_multiplier=lambda config: 1.0 / float(config.logits_scaling),
        ),
        Family(
            "smollm3",
            attention_bias="read",
            reads_mlp_bias=True,
            windows="by type",
            layers_without_rope=True,
        ),
    )
}


def family_of(config: PreTrainedConfig) -> Family:
    """Raises ModelError for a family that is not known, saying how one is added."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"model family {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)} "
            "(decoders with a gated FFN, or with experts that have one). A near relative of one of them is added as "
            "data: see docs/families.md"
        )
    return family
