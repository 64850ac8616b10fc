"""The instruction set, as Python sees it: every op's fields, shapes, dtypes and meaning, written once.

``csrc/program.h`` declares the same fields as plain structs; a test holds the two together. The executors know an op
by its name here, and nothing else.

Shapes are symbolic: a symbol gets its size from the first tensor it appears in and must agree everywhere else.
``f32``, ``i32``, ``i64`` and ``u8`` are fixed; ``cache`` is the dtype of the KV cache, one of floats per program;
a ``matrix`` has a format of its own (``model.matrix``): floats, or blocks of quantised weights.

Where a matrix is quantised, a program multiplies it with activations in ``int8``: each row of a matrix's input is cut
into blocks of 32, and a block becomes d * q with d = max |x| / 127 in fp32 and q = x / d, rounded to the nearest
integer, ties to even. With ``fp32`` activations they stay as they are. Weights are what their format says, exactly.
A neuron left out is an activation of 0 among the 32 of its block.

A *row* is one token of one sequence. The first ``num_sequences`` rows are decode rows: row i is the newest token of
sequence i, the one whose logits are wanted. The rows after them are prompt rows: tokens whose keys and values are to be
cached. A row whose ``row_mask`` flag is zero is neither read nor written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from skipkernels.errors import ModelError
from skipkernels.model.matrix import Matrix, MatrixOperand, StackedMatrix, TransposedMatrix, formats_of

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("int8", "fp32")
_FIXED_DTYPES = {"f32": torch.float32, "i32": torch.int32, "i64": torch.int64, "u8": torch.uint8}


@dataclass(frozen=True)
class TensorField:
    """One tensor operand: dtype kind, symbolic shape, whether the op reads and writes it, whether it may be absent,
    and whether it lies in (pinned) memory of the host, where a step's results can be read while a device runs on."""

    dtype: str
    shape: tuple[str, ...]
    access: str = "in"
    optional: bool = False
    on_host: bool = False


def _t(spec: str, access: str = "in", optional: bool = False, on_host: bool = False) -> TensorField:
    dtype, *shape = spec.split()
    return TensorField(dtype, tuple(shape), access, optional, on_host)


@dataclass(frozen=True)
class Op:
    """One instruction kind. ``scalars`` maps a field to ``int`` or ``float``; ``relations`` hold between sizes;
    ``rows`` is the size of ``row_mask``: ``num_rows``, or ``num_sequences`` where only decode rows take part."""

    name: str
    doc: str
    tensors: dict[str, TensorField]
    scalars: dict[str, type] = field(default_factory=dict)
    relations: tuple[tuple[str, Callable[[dict[str, int]], bool]], ...] = ()
    rows: str = "num_rows"

    @property
    def symbols(self) -> tuple[str, ...]:
        """Every size symbol, in order of first appearance."""
        return tuple(dict.fromkeys(symbol for tensor in self.tensors.values() for symbol in tensor.shape))

    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name, tensor in self.tensors.items() if tensor.access != "in")


_PAGED_CACHE = {
    "k_cache": _t("cache num_blocks num_key_value_heads block_size head_dim", "inout"),
    "v_cache": _t("cache num_blocks num_key_value_heads block_size head_dim", "inout"),
    "block_table": _t("i32 num_sequences blocks_per_sequence"),
    "row_sequence": _t("i32 num_rows"),
    "row_position": _t("i32 num_rows"),
}
"""Position p of sequence s stands in block ``block_table[s, p / block_size]``, at offset ``p % block_size``."""

_HAS_ROTARY_PAIRS = ("2 rotary_pairs are at most head_dim", lambda s: 2 * s["rotary_pairs"] <= s["head_dim"])

_CHOSEN_EXPERTS = {
    "expert_begins": _t("i32 num_begins"),
    "expert_pairs": _t("i32 num_pairs"),
}
"""Who chose expert e: ``expert_pairs[expert_begins[e] : expert_begins[e + 1]]``, in ascending order. The c-th choice of
row r is pair r * experts_per_token + c. Behind the last expert's the list is undefined."""

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "embed",
            """hidden_states = ``scale`` times the embedding of each row's token. Where a prompt row's token is -1, its
            embedding stands in prompt_embeddings (images and sounds), at the row's number among the prompt rows; it is
            taken as it is.
            """,
            {
                "hidden_states": _t("f32 num_rows hidden_size", "out"),
                "embed_tokens": _t("matrix vocab_size hidden_size"),
                "input_ids": _t("i32 num_rows"),
                "prompt_embeddings": _t("f32 num_prompt_rows hidden_size"),
            },
            {"scale": float},
        ),
        Op(
            "skip_gate",
            """Decides run_ffn of ``layer`` for each sequence's decode row (FFN-SkipLLM, arXiv 2404.03865), by the
            sequence's own policy: clears flags, never sets them. A sequence whose gate_mode is 0 (dense), or whose
            ``gated[layer]`` is 0, is left alone.

            gate_mode 1 (similarity): where the FFN of ``layer - 1`` ran, similarity = <h, h'> / (|h| |h'|) is reduced
            from its partial sums in their order (0 for a zero vector) and stored; a sequence past its warm-up whose
            similarity reaches ``gate_threshold[layer - 1]`` triggers, and has the next ``gate_span`` FFNs to skip.
            batch_rule 0 (per_row) lets each sequence decide; those of batch_rule 1 (all), and those of 2 (majority),
            trigger every one of their own kind or none; one in its warm-up vetoes.
            gate_mode 2 (fixed): past the warm-up, skips. gate_mode 3 (random): past the warm-up, skips where the
            counter-based generator, at (gate_seed, num_generated, layer), falls below ``gate_probability``.

            ``target_ratio`` above 0 (similarity, per_row) makes the sequence's running skip ratio hold that value: the
            gate owes it ``target_ratio * num_hidden_layers`` FFNs per token, from ``ramp_tokens`` on for the warm-up
            too, and counts in ``skipped`` what it got. The limit on 1 - similarity is (1 - threshold) *
            threshold_scale, widened or narrowed by what is owed now; at the sequence's ``first_gated`` layer
            threshold_scale follows what was owed before. Half a token's FFNs (num_hidden_layers / 2) are the most it
            may run ahead or behind: beyond, it triggers never or always. Every operation is one fp32 rounding.
            """,
            {
                "run_ffn": _t("i32 num_hidden_layers num_rows", "inout"),
                "skip_remaining": _t("i32 num_sequences", "inout"),
                "similarity": _t("f32 num_hidden_layers num_sequences", "out"),
                "similarity_partials": _t("f32 num_partials num_sequences three"),
                "num_generated": _t("i32 num_sequences"),
                "skipped": _t("i32 num_sequences", "inout"),
                "threshold_scale": _t("f32 num_sequences", "inout"),
                "gate_mode": _t("i32 num_sequences"),
                "gated": _t("i32 num_hidden_layers num_sequences"),
                "first_gated": _t("i32 num_sequences"),
                "gate_threshold": _t("f32 num_hidden_layers num_sequences"),
                "gate_span": _t("i32 num_sequences"),
                "warmup_tokens": _t("i32 num_sequences"),
                "batch_rule": _t("i32 num_sequences"),
                "gate_probability": _t("f32 num_sequences"),
                "gate_seed": _t("i64 num_sequences"),
                "target_ratio": _t("f32 num_sequences"),
                "ramp_tokens": _t("i32 num_sequences"),
            },
            {"layer": int},
            (("similarity_partials holds 3 sums", lambda s: s["three"] == 3),),
            rows="num_sequences",
        ),
        Op(
            "neuron_gate",
            """Sets the factor on each sequence's thresholds for neurons in this step: neuron_scale of its decode row, 0
            (keep all) in its warm-up, then ``threshold_scale``, which stays 1 unless a ratio is held. Recorded in
            scale_map under ``num_generated``, so that a token can be computed again as it was.

            ``neuron_target_ratio`` above 0 makes the sequence's running share of FFN bytes not read hold that value.
            A token has ``ffn_bytes`` num_hidden_layers of them; ``left_out`` are those not read so far in FFNs that
            ran, and each FFN in ``skipped`` adds ``ffn_bytes``, the mean of the layers. behind = (owed - those) / a
            token's, within -1 and 1, where owed grows as in skip_gate, from ``ramp_tokens`` on for the warm-up too.
            threshold_scale grows by the factor 1 + behind / 4, and neuron_scale is threshold_scale (1 + 2 behind), or
            threshold_scale / (1 - 2 behind) where that is negative. Every operation is one fp32 rounding.
            """,
            {
                "neuron_scale": _t("f32 num_rows", "inout"),
                "num_generated": _t("i32 num_sequences"),
                "warmup_tokens": _t("i32 num_sequences"),
                "ramp_tokens": _t("i32 num_sequences"),
                "neuron_target_ratio": _t("f32 num_sequences"),
                "threshold_scale": _t("f32 num_sequences", "inout"),
                "skipped": _t("i32 num_sequences"),
                "left_out": _t("i64 num_sequences"),
                "scale_map": _t("f32 num_sequences max_seq_len", "inout", on_host=True),
            },
            {"num_hidden_layers": int, "ffn_bytes": int},
            rows="num_sequences",
        ),
        Op(
            "qkv_rope_append",
            """query = rope(q), and k = rope(k), v into the paged cache at the row's position, of
            qkv_proj(rms_norm(hidden_states)).

            q and k are normed per head first where q_norm and k_norm are given (Qwen3). Rotary pairs are
            (i, i + rotary_pairs), and channels from 2 rotary_pairs on are not rotated. Queries are multiplied by
            ``query_scale`` of their position, where it is given (Ministral 3). The angle is that of row_position; where
            position_axes is given (M-RoPE, arXiv 2409.12191), a prompt row's pair i has the position
            ``prompt_positions[axis]`` of its axis, and a negative one rotates backwards.
            """,
            {
                "hidden_states": _t("f32 num_rows hidden_size"),
                "input_layernorm": _t("f32 hidden_size"),
                "qkv_proj": _t("matrix qkv_size hidden_size"),
                "qkv_bias": _t("f32 qkv_size", optional=True),
                "q_norm": _t("f32 head_dim", optional=True),
                "k_norm": _t("f32 head_dim", optional=True),
                "rope_cos": _t("f32 max_seq_len rotary_pairs"),
                "rope_sin": _t("f32 max_seq_len rotary_pairs"),
                "query_scale": _t("f32 max_seq_len", optional=True),
                "position_axes": _t("i32 rotary_pairs", optional=True),
                "prompt_positions": _t("i32 num_prompt_rows three", optional=True),
                "query": _t("f32 num_rows num_attention_heads head_dim", "out"),
                **_PAGED_CACHE,
            },
            {"rms_norm_eps": float},
            (
                _HAS_ROTARY_PAIRS,
                (
                    "qkv_size = (num_attention_heads + 2 num_key_value_heads) head_dim",
                    lambda s: (
                        s["qkv_size"] == (s["num_attention_heads"] + 2 * s["num_key_value_heads"]) * s["head_dim"]
                    ),
                ),
                ("prompt_positions holds 3 axes", lambda s: s.get("three", 3) == 3),
            ),
        ),
        Op(
            "norm_rope_append",
            """query = rope(q_norm(q)), and k = rope(k_norm(k)), v into the paged cache at the row's position, of
            ``qkv``; then qkv = 0. For models that norm q and k over all their heads together (OLMo 2): o_proj_add has
            added qkv_proj's product to the zeros of qkv before. Rotary pairs as for qkv_rope_append.
            """,
            {
                "qkv": _t("f32 num_rows qkv_size", "inout"),
                "q_norm": _t("f32 query_size"),
                "k_norm": _t("f32 key_size"),
                "rope_cos": _t("f32 max_seq_len rotary_pairs"),
                "rope_sin": _t("f32 max_seq_len rotary_pairs"),
                "query": _t("f32 num_rows num_attention_heads head_dim", "out"),
                **_PAGED_CACHE,
            },
            {"rms_norm_eps": float},
            (
                _HAS_ROTARY_PAIRS,
                (
                    "query_size = num_attention_heads head_dim",
                    lambda s: s["query_size"] == s["num_attention_heads"] * s["head_dim"],
                ),
                (
                    "key_size = num_key_value_heads head_dim",
                    lambda s: s["key_size"] == s["num_key_value_heads"] * s["head_dim"],
                ),
                ("qkv_size = query_size + 2 key_size", lambda s: s["qkv_size"] == s["query_size"] + 2 * s["key_size"]),
            ),
        ),
        Op(
            "decode_attention",
            """attn_output = softmax(scaling q k^T) v over the positions of the row's own sequence from
            max(0, row_position + 1 - sliding_window) to row_position, read through the block table.

            Grouped queries: head h attends with key/value head h // (num_attention_heads / num_key_value_heads).
            sliding_window 0 means none. ``sinks`` (gpt-oss, arXiv 2309.17453) are one more score of each head, of a
            position without a value. Where ``softcap`` is not 0, a scaled score s becomes softcap tanh(s / softcap)
            (Gemma 2). The range is cut at multiples of ``kv_split_size`` positions and merged in
            order, so the result does not depend on how many workers there are, on block_size, or on which rows share
            the step. attn_partials is scratch.
            """,
            {
                "query": _t("f32 num_rows num_attention_heads head_dim"),
                **{name: _t(" ".join((spec.dtype, *spec.shape))) for name, spec in _PAGED_CACHE.items()},
                "sinks": _t("f32 num_attention_heads", optional=True),
                "attn_partials": _t("f32 num_rows num_attention_heads num_splits partial_size", "scratch"),
                "attn_output": _t("f32 num_rows num_attention_heads head_dim", "out"),
            },
            {"scaling": float, "softcap": float, "sliding_window": int, "kv_split_size": int},
            (
                ("partial_size = head_dim + 2", lambda s: s["partial_size"] == s["head_dim"] + 2),
                ("heads are grouped evenly", lambda s: s["num_attention_heads"] % s["num_key_value_heads"] == 0),
            ),
        ),
        Op(
            "o_proj_add",
            """hidden_states += o_proj(attn_output). Also another product of rows as they are, which is added to what
            stands in a buffer (norm_rope_append).""",
            {
                "attn_output": _t("f32 num_rows num_attention_heads head_dim"),
                "o_proj": _t("matrix hidden_size attention_size"),
                "o_proj_bias": _t("f32 hidden_size", optional=True),
                "hidden_states": _t("f32 num_rows hidden_size", "inout"),
            },
            {},
            (
                (
                    "attention_size = num_attention_heads head_dim",
                    lambda s: s["attention_size"] == s["num_attention_heads"] * s["head_dim"],
                ),
            ),
        ),
        Op(
            "gate_up_act",
            """intermediate = act(gate_proj(x)) * up_proj(x) of x = rms_norm(hidden_states), or of hidden_states as they
            are where there is no norm (OLMo 2; also in gate_proj_act and up_proj_mul); gate rows before up rows.
            ``activation`` numbers ``model.config.ACTIVATIONS``: 0 silu, 1 gelu_tanh (GELU by tanh), 2 clamped_swiglu
            (gpt-oss): act(gate) = gate sigmoid(1.702 gate) of gate, at most 7, is multiplied by up + 1 with up within
            -7 and 7.
            """,
            {
                "hidden_states": _t("f32 num_rows hidden_size"),
                "post_attention_layernorm": _t("f32 hidden_size", optional=True),
                "gate_up_proj": _t("matrix gate_up_size hidden_size"),
                "intermediate": _t("f32 num_rows intermediate_size", "out"),
            },
            {"rms_norm_eps": float, "activation": int},
            (("gate_up_size = 2 intermediate_size", lambda s: s["gate_up_size"] == 2 * s["intermediate_size"]),),
        ),
        Op(
            "down_proj_add",
            """hidden_states += down_proj(intermediate); with similarity_partials given, for decode rows also <h, h'>,
            |h|^2 and |h'|^2 of the residual stream before (h) and after (h'), one partial sum for each
            ``rows_per_partial`` channels.
            """,
            {
                "intermediate": _t("f32 num_rows intermediate_size"),
                "down_proj": _t("matrix hidden_size intermediate_size"),
                "hidden_states": _t("f32 num_rows hidden_size", "inout"),
                "similarity_partials": _t("f32 num_partials num_sequences three", "out", optional=True),
            },
            {"rows_per_partial": int},
            (),
        ),
        Op(
            "branch_add",
            """hidden_states += multiplier * rms_norm(branch), or multiplier * branch without a norm; then branch = 0.
            For models that change a whole branch before they add it: a norm behind it (Gemma), a multiplier (Granite).
            There o_proj_add and down_proj_add are given branch in the place of hidden_states, and add to its zeros.
            similarity_partials as for down_proj_add.
            """,
            {
                "branch": _t("f32 num_rows hidden_size", "inout"),
                "norm": _t("f32 hidden_size", optional=True),
                "hidden_states": _t("f32 num_rows hidden_size", "inout"),
                "similarity_partials": _t("f32 num_partials num_sequences three", "out", optional=True),
            },
            {"multiplier": float, "rms_norm_eps": float, "rows_per_partial": int},
        ),
        Op(
            "route_experts",
            """Chooses each row's experts (Switch Transformers, arXiv 2101.03961; Mixtral, arXiv 2401.04088):
            router_logits = router(x) + router_bias of x = rms_norm(hidden_states); expert_ids are those of the largest,
            in descending order, the lower id of equals first; expert_weights are their shares of the softmax over all
            experts, with ``norm_topk_prob`` divided by their sum. Adds to ``experts_read[layer]`` how many experts some
            row chose: those whose matrices are read.
            """,
            {
                "hidden_states": _t("f32 num_rows hidden_size"),
                "post_attention_layernorm": _t("f32 hidden_size"),
                "router": _t("matrix num_experts hidden_size"),
                "router_bias": _t("f32 num_experts", optional=True),
                "router_logits": _t("f32 num_rows num_experts", "out"),
                "expert_ids": _t("i32 num_rows experts_per_token", "out"),
                "expert_weights": _t("f32 num_rows experts_per_token", "out"),
                "expert_begins": _t("i32 num_begins", "out"),
                "expert_pairs": _t("i32 num_pairs", "inout"),
                "experts_read": _t("i64 num_hidden_layers", "inout"),
            },
            {"rms_norm_eps": float, "norm_topk_prob": int, "layer": int},
            (
                ("num_begins = num_experts + 1", lambda s: s["num_begins"] == s["num_experts"] + 1),
                (
                    "num_pairs = num_rows experts_per_token",
                    lambda s: s["num_pairs"] == s["num_rows"] * s["experts_per_token"],
                ),
            ),
        ),
        Op(
            "experts_gate_up_act",
            """gate_up_act of each row's chosen experts: expert_intermediate[row, choice] of that expert's gate_proj and
            up_proj, which stand one below the other, expert by expert, and of their biases, where there are such. Only
            chosen experts' are read.

            With ``gate_thresholds`` a neuron of a row's expert whose |act(gate)| is below ``gate_thresholds[the row's
            sequence, layer] * neuron_scale``, one fp32 rounding, or 0, is left out: 0 in expert_intermediate. Rows of
            up_proj are read where some row of the expert keeps the neuron. select_neurons counts them afterwards, and
            leaves out products.
            """,
            {
                "hidden_states": _t("f32 num_rows hidden_size"),
                "post_attention_layernorm": _t("f32 hidden_size"),
                "gate_up_proj": _t("matrix gate_up_size hidden_size"),
                "gate_up_bias": _t("f32 gate_up_size", optional=True),
                **_CHOSEN_EXPERTS,
                "gate_thresholds": _t("f32 num_sequences num_hidden_layers one", optional=True),
                "row_sequence": _t("i32 num_rows", optional=True),
                "neuron_scale": _t("f32 num_rows", optional=True),
                "expert_intermediate": _t("f32 num_rows experts_per_token expert_size", "out"),
            },
            {"rms_norm_eps": float, "activation": int, "layer": int},
            (
                (
                    "gate_up_size = 2 experts expert_size",
                    lambda s: s["gate_up_size"] == 2 * (s["num_begins"] - 1) * s["expert_size"],
                ),
                ("a layer has 1 gate threshold", lambda s: s.get("one", 1) == 1),
            ),
        ),
        Op(
            "experts_down_proj_add",
            """hidden_states += the sum over a row's chosen experts, in the order of their ids, of expert_weights *
            (down_proj(expert_intermediate) + its down_proj_bias). down_proj holds one expert's rows after the other's;
            only chosen experts' are read. similarity_partials as for down_proj_add.
            """,
            {
                "expert_intermediate": _t("f32 num_rows experts_per_token expert_size"),
                "expert_weights": _t("f32 num_rows experts_per_token"),
                **_CHOSEN_EXPERTS,
                "down_proj": _t("matrix down_size expert_size"),
                "down_proj_bias": _t("f32 down_size", optional=True),
                "hidden_states": _t("f32 num_rows hidden_size", "inout"),
                "similarity_partials": _t("f32 num_partials num_sequences three", "out", optional=True),
            },
            {"rows_per_partial": int},
            (
                (
                    "down_size = experts hidden_size",
                    lambda s: s["down_size"] == (s["num_begins"] - 1) * s["hidden_size"],
                ),
            ),
        ),
        Op(
            "experts_down_proj_neurons_add",
            """experts_down_proj_add over a down_proj that lies transposed, one neuron a row, expert after expert: of a
            chosen expert only the rows of neurons are read that are not 0 in expert_intermediate of some row.

            The sum over an expert's neurons is cut into chunks of ``neuron_chunk`` neurons, added in their order, as in
            down_proj_neurons_add.
            """,
            {
                "expert_intermediate": _t("f32 num_rows experts_per_token expert_size"),
                "expert_weights": _t("f32 num_rows experts_per_token"),
                **_CHOSEN_EXPERTS,
                "down_proj": _t("matrix down_size hidden_size"),
                "down_proj_bias": _t("f32 bias_size", optional=True),
                "hidden_states": _t("f32 num_rows hidden_size", "inout"),
                "similarity_partials": _t("f32 num_partials num_sequences three", "out", optional=True),
            },
            {"rows_per_partial": int, "neuron_chunk": int},
            (
                (
                    "down_size = experts expert_size",
                    lambda s: s["down_size"] == (s["num_begins"] - 1) * s["expert_size"],
                ),
                (
                    "bias_size = experts hidden_size",
                    lambda s: s.get("bias_size") in (None, (s["num_begins"] - 1) * s["hidden_size"]),
                ),
            ),
        ),
        Op(
            "gate_proj_act",
            "intermediate = act(gate_proj(x)) of x = rms_norm(hidden_states), of every neuron.",
            {
                "hidden_states": _t("f32 num_rows hidden_size"),
                "post_attention_layernorm": _t("f32 hidden_size", optional=True),
                "gate_proj": _t("matrix intermediate_size hidden_size"),
                "intermediate": _t("f32 num_rows intermediate_size", "out"),
            },
            {"rms_norm_eps": float, "activation": int},
        ),
        Op(
            "select_neurons",
            """Leaves neurons out (CATS, arXiv 2404.08763; TEAL, arXiv 2408.14690): intermediate = 0 where its magnitude
            is below ``neuron_thresholds[the row's sequence, layer] * neuron_scale``, one fp32 rounding, for each row by
            itself. A layer has a threshold for each neuron, or one for all. ``neurons`` lists, in ascending order,
            those that are not 0 in some row, ``num_neurons`` their number: a neuron that is exactly 0 everywhere adds
            nothing, and is not read either. The list's rest is undefined. Of experts, a row's neurons are those of the
            experts it chose, one choice after the other, and the kernels need no list.

            What a decode row keeps is recorded in kept_map under (num_generated, layer, ``stage``), and
            ``neuron_bytes`` for each that it leaves out are added to ``left_out``. stage 0 is what up_proj reads, after
            gate_proj_act, 1 what down_proj reads.
            """,
            {
                "intermediate": _t("f32 num_rows intermediate_size", "inout"),
                "neuron_thresholds": _t("f32 num_sequences num_hidden_layers num_thresholds"),
                "row_sequence": _t("i32 num_rows"),
                "neuron_scale": _t("f32 num_rows"),
                "num_generated": _t("i32 num_sequences"),
                "neurons": _t("i32 intermediate_size", "out"),
                "num_neurons": _t("i32 one", "out"),
                "left_out": _t("i64 num_sequences", "inout"),
                "kept_map": _t("i32 num_sequences max_seq_len num_hidden_layers two", "inout", on_host=True),
            },
            {"layer": int, "stage": int, "neuron_bytes": int},
            (
                (
                    "a layer has 1 threshold or intermediate_size",
                    lambda s: s["num_thresholds"] in (1, s["intermediate_size"]),
                ),
                ("num_neurons holds 1 number", lambda s: s["one"] == 1),
                ("kept_map holds 2 stages", lambda s: s["two"] == 2),
            ),
        ),
        Op(
            "up_proj_mul",
            """intermediate *= up_proj(x) of x = rms_norm(hidden_states), for the neurons of the list, where it is not
            0. No other row of up_proj is read.
            """,
            {
                "hidden_states": _t("f32 num_rows hidden_size"),
                "post_attention_layernorm": _t("f32 hidden_size", optional=True),
                "up_proj": _t("matrix intermediate_size hidden_size"),
                "neurons": _t("i32 intermediate_size"),
                "num_neurons": _t("i32 one"),
                "intermediate": _t("f32 num_rows intermediate_size", "inout"),
            },
            {"rms_norm_eps": float},
        ),
        Op(
            "down_proj_neurons_add",
            """down_proj_add over a down_proj that lies transposed, one neuron a row: only the rows of the list's
            neurons are read, without a list all. Of blocks, the scales that 32 neurons share are read where one is.

            The sum over neurons is cut into chunks of ``neuron_chunk`` neurons, added in their order, so that a row's
            bits depend neither on the list of its neighbours nor on the number of workers.
            """,
            {
                "intermediate": _t("f32 num_rows intermediate_size"),
                "neurons": _t("i32 intermediate_size", optional=True),
                "num_neurons": _t("i32 one", optional=True),
                "down_proj": _t("matrix intermediate_size hidden_size"),
                "hidden_states": _t("f32 num_rows hidden_size", "inout"),
                "similarity_partials": _t("f32 num_partials num_sequences three", "out", optional=True),
            },
            {"rows_per_partial": int, "neuron_chunk": int},
        ),
        Op(
            "lm_head",
            """logits = lm_head(rms_norm(hidden_states)) of the decode rows; where ``softcap`` is not 0, softcap
            tanh(logits / softcap) (Gemma 2).""",
            {
                "hidden_states": _t("f32 num_rows hidden_size"),
                "norm": _t("f32 hidden_size"),
                "lm_head": _t("matrix vocab_size hidden_size"),
                "logits": _t("f32 num_sequences vocab_size", "out"),
            },
            {"rms_norm_eps": float, "softcap": float},
            rows="num_sequences",
        ),
        Op(
            "sample",
            """next_token = argmax of the logits (temperature 0), or a draw from them.

            In transformers' order: logit_bias (added), repetition penalty on ``seen`` tokens, frequency and presence
            penalty (OpenAI's: count * frequency_penalty is subtracted, then presence_penalty, from tokens generated
            ``seen`` >> 1 times), token_mask, temperature, top-k (0: off), top-p (1: off), min-p (0: off). ``adjusts``
            says which of them a row has: 1 bias, 2 frequency and presence, 4 mask; the others are not read. Bit
            t % 32 of word t / 32 of token_mask is set where token t is allowed. Every operation is one fp32 rounding.

            The draw is Gumbel-max with one Philox4x32-10 number per token id, keyed by (seed,
            num_generated): the same seed gives the same tokens on every executor, alone or in a batch. Where the
            largest score is NaN or infinite, the argmax is taken (the first NaN, where there is one).

            Where num_logprobs is n > 0, logprobs and top_tokens at num_generated get log softmax of the logits as the
            model made them: of next_token first, then of the n - 1 likeliest tokens (the lower id of equals first).
            """,
            {
                "logits": _t("f32 num_sequences vocab_size"),
                "seen": _t("u8 num_sequences vocab_size"),
                "num_generated": _t("i32 num_sequences"),
                "temperature": _t("f32 num_sequences"),
                "top_k": _t("i32 num_sequences"),
                "top_p": _t("f32 num_sequences"),
                "min_p": _t("f32 num_sequences"),
                "repetition_penalty": _t("f32 num_sequences"),
                "adjusts": _t("i32 num_sequences"),
                "logit_bias": _t("f32 num_sequences vocab_size"),
                "frequency_penalty": _t("f32 num_sequences"),
                "presence_penalty": _t("f32 num_sequences"),
                "token_mask": _t("i32 num_sequences mask_words"),
                "seed": _t("i64 num_sequences"),
                "num_logprobs": _t("i32 num_sequences"),
                "next_token": _t("i32 num_sequences", "out"),
                "logprobs": _t("f32 num_sequences max_seq_len num_logprobs_kept", "inout", on_host=True),
                "top_tokens": _t("i32 num_sequences max_seq_len num_top_kept", "inout", on_host=True),
            },
            relations=(
                ("mask_words = vocab_size / 32, rounded up", lambda s: s["mask_words"] == -(-s["vocab_size"] // 32)),
                ("logprobs has one more", lambda s: s["num_logprobs_kept"] == s["num_top_kept"] + 1),
            ),
            rows="num_sequences",
        ),
        Op(
            "advance",
            """Ends a step. Decode rows: records run_ffn and similarity under ``num_generated``, appends next_token to
            token_ids, counts it in ``seen`` (1: in the prompt; 2 more for each time it was generated, up to 127 times),
            moves row_position and num_generated on, clears ``active`` at an end-of-sequence token, at
            max_new_tokens or at max_seq_len, and arms run_ffn, similarity and skip_remaining for the next step. Where
            the next position has no block in block_table (-1), the row rests until the host has given it one:
            ``active`` and run_ffn are cleared and the rest is as if it went on. ``progress``, written last, tells the
            host (num_generated, 0: ended, 1: decoding, 2: waits for a block).
            Prompt rows live for one step: ``active`` and run_ffn are cleared.
            """,
            {
                "next_token": _t("i32 num_sequences"),
                "eos_token_ids": _t("i32 num_sequences max_eos"),
                "max_new_tokens": _t("i32 num_sequences"),
                "block_table": _t("i32 num_sequences blocks_per_sequence"),
                "input_ids": _t("i32 num_rows", "out"),
                "token_ids": _t("i32 num_sequences token_capacity", "inout", on_host=True),
                "seen": _t("u8 num_sequences vocab_size", "inout"),
                "row_position": _t("i32 num_rows", "inout"),
                "num_generated": _t("i32 num_sequences", "inout"),
                "active": _t("i32 num_rows", "inout"),
                "skip_remaining": _t("i32 num_sequences", "out"),
                "run_ffn": _t("i32 num_hidden_layers num_rows", "inout"),
                "similarity": _t("f32 num_hidden_layers num_sequences", "inout"),
                "run_map": _t("u8 num_sequences max_seq_len num_hidden_layers", "inout", on_host=True),
                "similarity_map": _t("f32 num_sequences max_seq_len num_hidden_layers", "inout", on_host=True),
                "progress": _t("i32 num_sequences two", "out", on_host=True),
            },
            {"block_size": int},
            (
                ("token_ids holds max_seq_len + 1 tokens", lambda s: s["token_capacity"] == s["max_seq_len"] + 1),
                ("progress holds 2 numbers", lambda s: s["two"] == 2),
            ),
        ),
    )
}


@dataclass(frozen=True)
class Instruction:
    """One step of the recorded program: an op, its operands, and the flag that predicates it, per row.

    ``sizes`` follows from the tensors. ``row_mask`` is int32 [num_rows] or [num_sequences] (``Op.rows``) on the
    program's device; a row runs where it is non-zero.
    """

    op: str
    tensors: dict[str, Any]  # torch.Tensor, a matrix of blocks, or None for an absent optional operand
    scalars: dict[str, int | float]
    sizes: dict[str, int]
    row_mask: torch.Tensor
    activations: str = "int8"

    @property
    def matrices(self) -> dict[str, MatrixOperand]:
        """The matrix operands by name."""
        return {name: self.tensors[name] for name, spec in OPS[self.op].tensors.items() if spec.dtype == "matrix"}

    @property
    def rows(self) -> list[int]:
        """The rows this instruction acts on now."""
        return [int(row) for row in self.row_mask.nonzero()[:, 0]]


Operand = MatrixOperand | int | float | None


def instruction(op_name: str, *, row_mask: torch.Tensor, activations: str = "int8", **operands: Operand) -> Instruction:
    """Builds a validated instruction: dtypes, symbolic shapes, contiguity, one device.

    Args:
        activations: what quantised matrices are multiplied with, one of ``ACTIVATIONS``.

    Raises:
        ValueError: with the op, the field, the expected and the actual value.
    """
    op = OPS[op_name]
    if activations not in ACTIVATIONS:
        raise ValueError(f"unknown activations {activations!r}; use one of {', '.join(ACTIVATIONS)}")
    known = set(op.tensors) | set(op.scalars)
    if unknown := set(operands) - known:
        raise ValueError(f"{op_name}: unknown operand {sorted(unknown)[0]!r}; it takes {', '.join(sorted(known))}")
    tensors: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    cache_dtype: torch.dtype | None = None
    for name, spec in op.tensors.items():
        tensor = operands.get(name)
        tensors[name] = tensor
        if tensor is None:
            if not spec.optional:
                raise ValueError(f"{op_name}: operand {name} is missing")
            continue
        if spec.dtype == "matrix":
            tensor = _checked_matrix(op_name, name, tensor)
        elif not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{op_name}: {name} must be a tensor, got {type(tensor).__name__}")
        elif spec.dtype == "cache":
            cache_dtype = cache_dtype or tensor.dtype
            if tensor.dtype not in CACHE_DTYPES or tensor.dtype != cache_dtype:
                raise ValueError(f"{op_name}: {name} has dtype {tensor.dtype}, expected {cache_dtype} as its fellows")
        elif tensor.dtype != _FIXED_DTYPES[spec.dtype]:
            raise ValueError(f"{op_name}: {name} has dtype {tensor.dtype}, expected {_FIXED_DTYPES[spec.dtype]}")
        if len(tensor.shape) != len(spec.shape):
            raise ValueError(f"{op_name}: {name} has shape {tuple(tensor.shape)}, expected ({', '.join(spec.shape)})")
        if isinstance(tensor, torch.Tensor) and not tensor.is_contiguous():
            raise ValueError(f"{op_name}: {name} is not contiguous (strides {tensor.stride()})")
        device = "cpu" if spec.on_host else row_mask.device
        if tensor.device != torch.device(device):
            raise ValueError(f"{op_name}: {name} is on {tensor.device}, expected {device}")
        for symbol, size in zip(spec.shape, tensor.shape, strict=True):
            if sizes.setdefault(symbol, size) != size:
                raise ValueError(f"{op_name}: {name} has {symbol}={size}, expected {sizes[symbol]}")
    if row_mask.dtype != torch.int32 or tuple(row_mask.shape) != (sizes[op.rows],):
        got = f"{row_mask.dtype} {list(row_mask.shape)}"
        raise ValueError(f"{op_name}: row_mask must be int32 [{sizes[op.rows]}], got {got}")
    for text, holds in op.relations:
        if not holds(sizes):
            raise ValueError(f"{op_name}: sizes {sizes} break the relation: {text}")
    scalars: dict[str, int | float] = {}
    for name, kind in op.scalars.items():
        if name not in operands:
            raise ValueError(f"{op_name}: operand {name} is missing")
        scalars[name] = kind(operands[name])
    return Instruction(op_name, tensors, scalars, sizes, row_mask, activations)


def _checked_matrix(op_name: str, name: str, matrix: object) -> MatrixOperand:
    if not isinstance(matrix, torch.Tensor | Matrix | StackedMatrix | TransposedMatrix):
        raise ValueError(f"{op_name}: {name} must be a matrix, got {type(matrix).__name__}")
    try:
        formats_of(matrix)
    except ModelError as error:
        raise ValueError(f"{op_name}: {name}: {error}") from error
    return matrix
