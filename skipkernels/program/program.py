"""The decode program: one step as a flat list of instructions over preallocated buffers. This is a token's life."""

from __future__ import annotations

import torch

from skipkernels.model.config import ACTIVATIONS, ModelConfig
from skipkernels.model.weights import ModelWeights
from skipkernels.program.state import DecodeState
from skipkernels.program.table import Instruction, Operand, instruction

Program = tuple[Instruction, ...]


def build_program(
    config: ModelConfig, weights: ModelWeights, state: DecodeState, *, gated: bool = False, activations: str = "int8"
) -> Program:
    """Records one step of every active row over the buffers of ``state``.

    Args:
        gated: with gates that skip FFNs by each sequence's own policy (``DecodeState.set_policy``). Without them the
            step is dense, reads no policy and measures nothing.
        activations: what quantised matrices are multiplied with, ``int8`` or ``fp32`` (``program.table``).
    """
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
        record(
            "qkv_rope_append",
            hidden_states=s.hidden_states,
            input_layernorm=layer.input_layernorm,
            qkv_proj=layer.qkv_proj,
            qkv_bias=layer.qkv_bias,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            rope_cos=rope_cos,
            rope_sin=rope_sin,
            position_axes=position_axes,
            prompt_positions=None if position_axes is None else s.prompt_positions,
            query=s.query,
            k_cache=s.k_cache[index],
            v_cache=s.v_cache[index],
            block_table=s.block_table,
            row_sequence=s.row_sequence,
            row_position=s.row_position,
            rms_norm_eps=eps,
        )
        record(
            "decode_attention",
            query=s.query,
            k_cache=s.k_cache[index],
            v_cache=s.v_cache[index],
            block_table=s.block_table,
            row_sequence=s.row_sequence,
            row_position=s.row_position,
            attn_partials=s.attn_partials,
            attn_output=s.attn_output,
            scaling=config.scaling,
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
        record(
            "gate_up_act",
            row_mask=s.run_ffn[index],
            hidden_states=s.hidden_states,
            post_attention_layernorm=layer.post_attention_layernorm,
            gate_up_proj=layer.gate_up_proj,
            intermediate=s.intermediate,
            rms_norm_eps=eps,
            activation=ACTIVATIONS.index(config.activation),
        )
        record(
            "down_proj_add",
            row_mask=s.run_ffn[index],
            intermediate=s.intermediate,
            down_proj=layer.down_proj,
            hidden_states=stream,
            similarity_partials=None if config.changes_branches else partials,
            rows_per_partial=s.layout.rows_per_partial,
        )
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
