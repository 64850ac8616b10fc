"""The decode program: one step as a flat list of instructions over preallocated buffers. This is a token's life."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from skipkernels.errors import PolicyError
from skipkernels.model.config import ACTIVATIONS, ModelConfig
from skipkernels.model.matrix import StackedMatrix, float_tensor, halves
from skipkernels.model.weights import LayerWeights, ModelWeights
from skipkernels.program.state import DecodeState
from skipkernels.program.table import Instruction, Operand, instruction
from skipkernels.skipping.policy import GatePlan

Program = tuple[Instruction, ...]
NO_NEURON_ROWS = (
    "neurons cannot be left out: down_proj lies as in the checkpoint, where a neuron is a column; "
    "load the engine with this policy, or with neuron_rows=True, which makes it a row"
)


@dataclass(frozen=True)
class Variant:
    """Which instructions a step needs beyond the dense ones; see ``build_program``."""

    gated: bool = False
    neurons: bool = False

    @classmethod
    def for_plans(cls, plans: Iterable[GatePlan | None]) -> Variant:
        """What a step needs whose rows have these plans."""
        wanted = [plan for plan in plans if plan is not None]
        return cls(
            gated=any(plan.gated_layers for plan in wanted), neurons=any(plan.neurons is not None for plan in wanted)
        )


def build_program(
    config: ModelConfig,
    weights: ModelWeights,
    state: DecodeState,
    *,
    gated: bool = False,
    neurons: bool = False,
    activations: str = "int8",
) -> Program:
    """Records one step of every active row over the buffers of ``state``.

    Args:
        gated: with gates that skip FFNs by each sequence's own policy (``DecodeState.set_policy``). Without them the
            step reads no policy for blocks and measures nothing.
        neurons: FFNs leave out neurons by each sequence's own policy. It takes weights that lie for it
            (``ModelWeights.neuron_rows``).
        activations: what quantised matrices are multiplied with, ``int8`` or ``fp32`` (``program.table``).

    Raises:
        PolicyError: ``neurons`` with weights that do not lie for it.
    """
    if neurons and not weights.neuron_rows:
        raise PolicyError(NO_NEURON_ROWS)
    s, eps = state, config.rms_norm_eps
    program: list[Instruction] = []

    def record(op: str, row_mask: torch.Tensor = s.active, **operands: Operand) -> None:
        program.append(instruction(op, row_mask=row_mask, activations=activations, **operands))

    def record_branch_add(rows: torch.Tensor, norm: torch.Tensor | None, partials: torch.Tensor | None) -> None:
        record(
            "branch_add",
            row_mask=rows,
            branch=s.branch,
            norm=norm,
            hidden_states=s.hidden_states,
            similarity_partials=partials,
            multiplier=config.residual_multiplier,
            rms_norm_eps=eps,
            rows_per_partial=s.layout.rows_per_partial,
        )

    partials = s.similarity_partials if gated else None
    record(
        "embed",
        hidden_states=s.hidden_states,
        embed_tokens=weights.embed_tokens,
        input_ids=s.input_ids,
        prompt_embeddings=s.prompt_embeddings,
        scale=config.embed_scale_in(weights.dtype),
    )
    # where a whole branch is normed or scaled before it is added, projections add into a buffer of its own
    stream = s.branch if config.changes_branches else s.hidden_states
    if neurons:
        record(
            "neuron_gate",
            row_mask=s.decode_rows,
            neuron_scale=s.neuron_scale,
            num_generated=s.num_generated,
            warmup_tokens=s.warmup_tokens,
            ramp_tokens=s.ramp_tokens,
            neuron_target_ratio=s.neuron_target_ratio,
            threshold_scale=s.threshold_scale,
            skipped=s.skipped,
            left_out=s.left_out,
            scale_map=s.scale_map,
            num_hidden_layers=config.num_hidden_layers,
            ffn_bytes=round(weights.ffn_nbytes()),
        )
    axes = config.position_axes
    position_axes = None if axes is None else torch.tensor(axes, dtype=torch.int32, device=s.active.device)
    for index, layer in enumerate(weights.layers):
        rope_cos, rope_sin = weights.rope_of(config, index)
        if gated:
            record(
                "skip_gate",
                row_mask=s.decode_rows,
                run_ffn=s.run_ffn,
                skip_remaining=s.skip_remaining,
                similarity=s.similarity,
                similarity_partials=s.similarity_partials,
                num_generated=s.num_generated,
                skipped=s.skipped,
                threshold_scale=s.threshold_scale,
                gate_mode=s.gate_mode,
                gated=s.gated,
                first_gated=s.first_gated,
                gate_threshold=s.gate_threshold,
                gate_span=s.gate_span,
                warmup_tokens=s.warmup_tokens,
                batch_rule=s.batch_rule,
                gate_probability=s.gate_probability,
                gate_seed=s.gate_seed,
                target_ratio=s.target_ratio,
                ramp_tokens=s.ramp_tokens,
                layer=index,
            )
        cache: dict[str, Operand] = {
            "k_cache": s.k_cache[index],
            "v_cache": s.v_cache[index],
            "block_table": s.block_table,
            "row_sequence": s.row_sequence,
            "row_position": s.row_position,
        }
        turned: dict[str, Operand] = {
            "q_norm": layer.q_norm,
            "k_norm": layer.k_norm,
            "rope_cos": rope_cos,
            "rope_sin": rope_sin,
            "query": s.query,
            "rms_norm_eps": eps,
        }
        if config.norms_whole_qk:
            record(
                "o_proj_add",
                attn_output=s.hidden_states[:, None],
                o_proj=layer.qkv_proj,
                o_proj_bias=layer.qkv_bias,
                hidden_states=s.qkv,
            )
            record("norm_rope_append", s.active, qkv=s.qkv, **turned, **cache)
        else:
            record(
                "qkv_rope_append",
                s.active,
                hidden_states=s.hidden_states,
                input_layernorm=layer.input_layernorm,
                qkv_proj=layer.qkv_proj,
                qkv_bias=layer.qkv_bias,
                query_scale=weights.query_scale,
                position_axes=position_axes,
                prompt_positions=None if position_axes is None else s.prompt_positions,
                **turned,
                **cache,
            )
        record(
            "decode_attention",
            s.active,
            query=s.query,
            **cache,
            sinks=layer.sinks,
            attn_partials=s.attn_partials,
            attn_output=s.attn_output,
            scaling=config.scaling,
            softcap=config.attention_softcap,
            sliding_window=config.sliding_windows[index] or 0,
            kv_split_size=s.layout.kv_split_size,
        )
        record(
            "o_proj_add",
            attn_output=s.attn_output,
            o_proj=layer.o_proj,
            o_proj_bias=layer.o_proj_bias,
            hidden_states=stream,
        )
        if config.changes_branches:
            record_branch_add(s.active, layer.attention_branch_norm, None)
        own_partials = None if config.changes_branches else partials
        if layer.router is None:
            _record_ffn(record, config, weights, state, index, stream, own_partials, neurons)
        else:
            _record_experts(record, config, weights, state, index, stream, own_partials, neurons)
        if config.changes_branches:
            record_branch_add(s.run_ffn[index], layer.ffn_branch_norm, partials)
    record(
        "lm_head",
        row_mask=s.decode_rows,
        hidden_states=s.hidden_states,
        norm=weights.norm,
        lm_head=weights.lm_head,
        logits=s.logits,
        rms_norm_eps=eps,
        softcap=config.logits_softcap,
    )
    record(
        "sample",
        row_mask=s.decode_rows,
        logits=s.logits,
        seen=s.seen,
        num_generated=s.num_generated,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        adjusts=s.adjusts,
        logit_bias=s.logit_bias,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        token_mask=s.token_mask,
        seed=s.seed,
        num_logprobs=s.num_logprobs,
        next_token=s.next_token,
        logprobs=s.logprobs,
        top_tokens=s.top_tokens,
    )
    record(
        "advance",
        next_token=s.next_token,
        eos_token_ids=s.eos_token_ids,
        max_new_tokens=s.max_new_tokens,
        block_table=s.block_table,
        input_ids=s.input_ids,
        token_ids=s.token_ids,
        seen=s.seen,
        row_position=s.row_position,
        num_generated=s.num_generated,
        active=s.active,
        skip_remaining=s.skip_remaining,
        run_ffn=s.run_ffn,
        similarity=s.similarity,
        run_map=s.run_map,
        similarity_map=s.similarity_map,
        progress=s.progress,
        block_size=s.block_size,
    )
    return tuple(program)


def _record_ffn(
    record: Callable[..., None],
    config: ModelConfig,
    weights: ModelWeights,
    s: DecodeState,
    index: int,
    stream: torch.Tensor,
    partials: torch.Tensor | None,
    neurons: bool,
) -> None:
    """From the residual stream to what the FFN of a layer without experts adds."""
    layer = weights.layers[index]
    if neurons:
        _record_neurons(record, config, layer, s, index)
    else:
        record(
            "gate_up_act",
            gate_up_proj=layer.gate_up_proj,
            intermediate=s.intermediate,
            activation=ACTIVATIONS.index(config.activation),
            **_normed(config, layer, s, index),
        )
    added = {
        "row_mask": s.run_ffn[index],
        "intermediate": s.intermediate,
        "hidden_states": stream,
        "similarity_partials": partials,
        "rows_per_partial": s.layout.rows_per_partial,
    }
    if not weights.neuron_rows:
        record("down_proj_add", down_proj=layer.down_proj, **added)
        return
    assert not isinstance(layer.down_proj, StackedMatrix)
    of_blocks = not isinstance(layer.down_proj, torch.Tensor)
    record(
        "down_proj_neurons_add",
        neurons=s.neurons[: config.intermediate_size] if neurons else None,
        num_neurons=s.num_neurons if neurons else None,
        down_proj=layer.down_proj.T,
        neuron_chunk=neuron_chunk(config.intermediate_size, of_blocks),
        **added,
    )


def _record_experts(
    record: Callable[..., None],
    config: ModelConfig,
    weights: ModelWeights,
    s: DecodeState,
    index: int,
    stream: torch.Tensor,
    partials: torch.Tensor | None,
    neurons: bool,
) -> None:
    """From the residual stream to what the chosen experts add."""
    layer = weights.layers[index]
    normed = _normed(config, layer, s, index)
    chosen = {"expert_begins": s.expert_begins, "expert_pairs": s.expert_pairs}
    record(
        "route_experts",
        router=layer.router,
        router_bias=layer.router_bias,
        router_logits=s.router_logits,
        expert_ids=s.expert_ids,
        expert_weights=s.expert_weights,
        experts_read=s.experts_read,
        norm_topk_prob=config.norm_topk_prob,
        layer=index,
        **normed,
        **chosen,
    )
    record(
        "experts_gate_up_act",
        gate_up_proj=layer.gate_up_proj,
        gate_up_bias=layer.gate_up_bias,
        gate_thresholds=s.gate_thresholds if neurons else None,
        row_sequence=s.row_sequence if neurons else None,
        neuron_scale=s.neuron_scale if neurons else None,
        expert_intermediate=s.expert_intermediate,
        activation=ACTIVATIONS.index(config.activation),
        layer=index,
        **normed,
        **chosen,
    )
    if neurons:
        products = s.expert_intermediate.flatten(1)
        _record_selection(record, layer, s, index, 0, products, s.no_thresholds)  # left out already
        _record_selection(record, layer, s, index, 1, products, s.product_thresholds[..., None])
    added = {
        "row_mask": s.run_ffn[index],
        "expert_intermediate": s.expert_intermediate,
        "expert_weights": s.expert_weights,
        "down_proj_bias": layer.down_proj_bias,
        "hidden_states": stream,
        "similarity_partials": partials,
        "rows_per_partial": s.layout.rows_per_partial,
        **chosen,
    }
    if not weights.neuron_rows:
        record("experts_down_proj_add", down_proj=layer.down_proj, **added)
        return
    record(
        "experts_down_proj_neurons_add",
        down_proj=float_tensor(layer.down_proj).T,
        neuron_chunk=neuron_chunk(config.moe_intermediate_size),
        **added,
    )


def _record_neurons(
    record: Callable[..., None], config: ModelConfig, layer: LayerWeights, s: DecodeState, index: int
) -> None:
    """From the residual stream to the products of gate and up of the neurons that some row keeps."""
    normed = _normed(config, layer, s, index)
    gate_proj, up_proj = halves(layer.gate_up_proj)
    record(
        "gate_proj_act",
        gate_proj=gate_proj,
        intermediate=s.intermediate,
        activation=ACTIVATIONS.index(config.activation),
        **normed,
    )
    _record_selection(record, layer, s, index, 0, s.intermediate, s.gate_thresholds)
    record(
        "up_proj_mul",
        up_proj=up_proj,
        neurons=s.neurons[: config.intermediate_size],
        num_neurons=s.num_neurons,
        intermediate=s.intermediate,
        **normed,
    )
    _record_selection(record, layer, s, index, 1, s.intermediate, s.product_thresholds[..., None])


def _normed(config: ModelConfig, layer: LayerWeights, s: DecodeState, index: int) -> dict[str, Operand]:
    """What every op of an FFN takes that reads the normed residual stream."""
    return {
        "row_mask": s.run_ffn[index],
        "hidden_states": s.hidden_states,
        "post_attention_layernorm": layer.post_attention_layernorm,
        "rms_norm_eps": config.rms_norm_eps,
    }


def _record_selection(
    record: Callable[..., None],
    layer: LayerWeights,
    s: DecodeState,
    index: int,
    stage: int,
    values: torch.Tensor,
    thresholds: torch.Tensor,
) -> None:
    """Leaves out neurons whose ``values`` [rows, neurons] are small, and counts those of a stage that are kept."""
    record(
        "select_neurons",
        row_mask=s.run_ffn[index],
        intermediate=values,
        neuron_thresholds=thresholds,
        row_sequence=s.row_sequence,
        neuron_scale=s.neuron_scale,
        num_generated=s.num_generated,
        neurons=s.neurons[: values.shape[1]],
        num_neurons=s.num_neurons,
        left_out=s.left_out,
        kept_map=s.kept_map,
        layer=index,
        stage=stage,
        neuron_bytes=layer.neuron_nbytes()[stage],
    )


def neuron_chunk(intermediate_size: int, of_blocks: bool = False) -> int:
    """Neurons whose share of an FFN's output is summed by itself: a 32nd of them, at least 64, in whole 32s. Of blocks,
    whose neurons take a quarter of the bytes and less, a 16th: the sums of chunks must not take longer to add."""
    chunks = 16 if of_blocks else 32
    return max(64, -(-intermediate_size // (32 * chunks)) * 32)
