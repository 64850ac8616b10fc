"""The decode program: one step as a flat list of instructions over preallocated buffers. This is a token's life."""

from __future__ import annotations

import torch

from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import ModelWeights
from skipkernels.program.state import DecodeState
from skipkernels.program.table import Instruction, instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES, Policy

Program = tuple[Instruction, ...]


def build_program(config: ModelConfig, weights: ModelWeights, state: DecodeState, policy: Policy) -> Program:
    """Records one decode step of every active row; built once per (model, policy, batch, max_seq_len).

    Raises:
        PolicyError: the policy is impossible on a model of this depth.
    """
    s, eps = state, config.rms_norm_eps
    plan = policy.plan(config.num_hidden_layers)
    gated = set(plan.gated_layers) if plan else set()
    tested = set(plan.tested_layers) if plan else set()
    program: list[Instruction] = []

    def record(op: str, when: torch.Tensor = s.active, **operands: torch.Tensor | int | float | None) -> None:
        program.append(instruction(op, when=when, **operands))

    record("embed", hidden_states=s.hidden_states, embed_tokens=weights.embed_tokens, input_ids=s.input_ids)
    for index, layer in enumerate(weights.layers):
        if plan and index in gated:
            record(
                "skip_gate",
                run_ffn=s.run_ffn,
                skip_remaining=s.skip_remaining,
                similarity=s.similarity,
                similarity_partials=s.similarity_partials,
                generated=s.generated,
                skipped=s.skipped,
                threshold_scale=s.threshold_scale,
                layer=index,
                mode=GATE_MODES.index(plan.mode),
                threshold=plan.thresholds[index - 1] if plan.thresholds else 0.0,
                span=plan.span,
                # the first generated token comes out of the prompt's last position, and a prompt runs every FFN
                warmup_tokens=max(1, plan.warmup_tokens),
                batch_rule=BATCH_RULES.index(plan.batch_rule),
                probability=plan.probability,
                seed=plan.seed,
                target_ratio=plan.target_ratio,
                ramp_tokens=plan.ramp_tokens,
                first_gate=index == plan.gated_layers[0],
            )
        record(
            "qkv_rope_append",
            hidden_states=s.hidden_states,
            input_layernorm=layer.input_layernorm,
            qkv_proj=layer.qkv_proj,
            qkv_bias=layer.qkv_bias,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            rope_cos=weights.rope_cos,
            rope_sin=weights.rope_sin,
            seq_len=s.seq_len,
            query=s.query,
            k_cache=s.k_cache[index],
            v_cache=s.v_cache[index],
            rms_norm_eps=eps,
        )
        record(
            "decode_attention",
            query=s.query,
            k_cache=s.k_cache[index],
            v_cache=s.v_cache[index],
            seq_len=s.seq_len,
            attn_partials=s.attn_partials,
            attn_output=s.attn_output,
            scaling=config.head_dim**-0.5,
            sliding_window=config.sliding_windows[index] or 0,
            kv_split=s.layout.kv_split,
        )
        record(
            "o_proj_add",
            attn_output=s.attn_output,
            o_proj=layer.o_proj,
            o_proj_bias=layer.o_proj_bias,
            hidden_states=s.hidden_states,
        )
        record(
            "gate_up_silu",
            when=s.run_ffn[index],
            hidden_states=s.hidden_states,
            post_attention_layernorm=layer.post_attention_layernorm,
            gate_up_proj=layer.gate_up_proj,
            intermediate=s.intermediate,
            rms_norm_eps=eps,
        )
        record(
            "down_proj_add",
            when=s.run_ffn[index],
            intermediate=s.intermediate,
            down_proj=layer.down_proj,
            hidden_states=s.hidden_states,
            similarity_partials=s.similarity_partials if index in tested else None,
            rows_per_partial=s.layout.rows_per_partial,
        )
    record(
        "lm_head",
        hidden_states=s.hidden_states,
        norm=weights.norm,
        lm_head=weights.lm_head,
        logits=s.logits,
        rms_norm_eps=eps,
    )
    record(
        "sample",
        logits=s.logits,
        seen=s.seen,
        generated=s.generated,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        seed=s.seed,
        next_token=s.next_token,
    )
    record(
        "advance",
        next_token=s.next_token,
        eos_token_ids=s.eos_token_ids,
        max_new_tokens=s.max_new_tokens,
        input_ids=s.input_ids,
        token_ids=s.token_ids,
        seen=s.seen,
        seq_len=s.seq_len,
        generated=s.generated,
        active=s.active,
        skip_remaining=s.skip_remaining,
        run_ffn=s.run_ffn,
        similarity=s.similarity,
        run_map=s.run_map,
        similarity_map=s.similarity_map,
        progress=s.progress,
    )
    return tuple(program)
