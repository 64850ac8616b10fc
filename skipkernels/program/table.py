"""The instruction set, as Python sees it: every op's fields, shapes, dtypes and meaning, written once.

``csrc/program.h`` declares the same fields as plain structs; a test holds the two together. The executors know an op
by its name here, and nothing else.

Shapes are symbolic: a symbol gets its size from the first tensor it appears in and must agree everywhere else.
``f32``, ``i32``, ``i64`` and ``u8`` are fixed; ``weight`` is the dtype of the model's matrices and of the KV cache,
one per program. A row whose ``when`` flag is zero is neither read nor written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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
    """One instruction kind. ``scalars`` maps a field to ``int`` or ``float``; ``relations`` hold between sizes."""

    name: str
    doc: str
    tensors: dict[str, TensorField]
    scalars: dict[str, type] = field(default_factory=dict)
    relations: tuple[tuple[str, Callable[[dict[str, int]], bool]], ...] = ()

    @property
    def symbols(self) -> tuple[str, ...]:
        """Every size symbol, in order of first appearance."""
        return tuple(dict.fromkeys(symbol for tensor in self.tensors.values() for symbol in tensor.shape))

    def outputs(self) -> tuple[str, ...]:
        return tuple(name for name, tensor in self.tensors.items() if tensor.access != "in")


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "embed",
            "hidden_states = the embedding of each row's current token.",
            {
                "hidden_states": _t("f32 batch_size hidden_size", "out"),
                "embed_tokens": _t("weight vocab_size hidden_size"),
                "input_ids": _t("i32 batch_size"),
            },
        ),
        Op(
            "skip_gate",
            """Decides run_ffn of ``layer`` for each row (FFN-SkipLLM, arXiv 2404.03865): clears flags, never sets them.

            mode 0 (similarity): where the FFN of ``layer - 1`` ran, similarity = <h, h'> / (|h| |h'|) is reduced from
            its partial sums in their order (0 for a zero vector) and stored; a row past its warm-up whose similarity
            reaches ``threshold`` triggers, and has the next ``span`` FFNs to skip. batch_rule 0 (per_row) lets each
            row decide, 1 (all) and 2 (majority) trigger every row at once or none; a row in its warm-up vetoes.
            mode 1 (fixed): every row past its warm-up skips. mode 2 (random): a row past its warm-up skips where the
            counter-based generator, at (seed, generated, layer), falls below ``probability``.

            ``target_ratio`` above 0 (mode 0, per_row) makes the row's running skip ratio hold that value: the gate
            owes the row ``target_ratio * num_hidden_layers`` FFNs per token, from ``ramp_tokens`` on for the warm-up
            too, and counts in ``skipped`` what it got. The limit on 1 - similarity is (1 - threshold) *
            threshold_scale, widened or narrowed by what is owed now; the step's ``first_gate`` lets threshold_scale
            follow what was owed before. Half a token's FFNs (num_hidden_layers / 2) are the most a row may run
            ahead or behind: beyond, it triggers never or always. Every operation is one fp32 rounding.
            """,
            {
                "run_ffn": _t("i32 num_hidden_layers batch_size", "inout"),
                "skip_remaining": _t("i32 batch_size", "inout"),
                "similarity": _t("f32 num_hidden_layers batch_size", "out"),
                "similarity_partials": _t("f32 num_partials batch_size three"),
                "generated": _t("i32 batch_size"),
                "skipped": _t("i32 batch_size", "inout"),
                "threshold_scale": _t("f32 batch_size", "inout"),
            },
            {
                "layer": int,
                "mode": int,
                "threshold": float,
                "span": int,
                "warmup_tokens": int,
                "batch_rule": int,
                "probability": float,
                "seed": int,
                "target_ratio": float,
                "ramp_tokens": int,
                "first_gate": int,
            },
            (("similarity_partials holds 3 sums", lambda s: s["three"] == 3),),
        ),
        Op(
            "qkv_rope_append",
            """query = rope(q), k_cache[seq_len] = rope(k), v_cache[seq_len] = v, of qkv_proj(rms_norm(hidden_states)).

            q and k are normed per head first where q_norm and k_norm are given (Qwen3). Rotary pairs
            are (i, i + head_dim/2).
            """,
            {
                "hidden_states": _t("f32 batch_size hidden_size"),
                "input_layernorm": _t("f32 hidden_size"),
                "qkv_proj": _t("weight qkv_size hidden_size"),
                "qkv_bias": _t("f32 qkv_size", optional=True),
                "q_norm": _t("f32 head_dim", optional=True),
                "k_norm": _t("f32 head_dim", optional=True),
                "rope_cos": _t("f32 max_seq_len half_head_dim"),
                "rope_sin": _t("f32 max_seq_len half_head_dim"),
                "seq_len": _t("i32 batch_size"),
                "query": _t("f32 batch_size num_attention_heads head_dim", "out"),
                "k_cache": _t("weight batch_size num_key_value_heads max_seq_len head_dim", "inout"),
                "v_cache": _t("weight batch_size num_key_value_heads max_seq_len head_dim", "inout"),
            },
            {"rms_norm_eps": float},
            (
                ("half_head_dim = head_dim / 2", lambda s: 2 * s["half_head_dim"] == s["head_dim"]),
                (
                    "qkv_size = (num_attention_heads + 2 num_key_value_heads) head_dim",
                    lambda s: (
                        s["qkv_size"] == (s["num_attention_heads"] + 2 * s["num_key_value_heads"]) * s["head_dim"]
                    ),
                ),
            ),
        ),
        Op(
            "decode_attention",
            """attn_output = softmax(scaling q k^T) v over positions max(0, seq_len + 1 - sliding_window) .. seq_len.

            Grouped queries: head h attends with key/value head h // (num_attention_heads / num_key_value_heads).
            sliding_window 0 means none. The range is cut into splits of ``kv_split`` positions that are merged in
            order, so the result does not depend on how many workers there are. attn_partials is scratch.
            """,
            {
                "query": _t("f32 batch_size num_attention_heads head_dim"),
                "k_cache": _t("weight batch_size num_key_value_heads max_seq_len head_dim"),
                "v_cache": _t("weight batch_size num_key_value_heads max_seq_len head_dim"),
                "seq_len": _t("i32 batch_size"),
                "attn_partials": _t("f32 batch_size num_attention_heads num_splits partial_size", "scratch"),
                "attn_output": _t("f32 batch_size num_attention_heads head_dim", "out"),
            },
            {"scaling": float, "sliding_window": int, "kv_split": int},
            (
                ("partial_size = head_dim + 2", lambda s: s["partial_size"] == s["head_dim"] + 2),
                ("heads are grouped evenly", lambda s: s["num_attention_heads"] % s["num_key_value_heads"] == 0),
            ),
        ),
        Op(
            "o_proj_add",
            "hidden_states += o_proj(attn_output).",
            {
                "attn_output": _t("f32 batch_size num_attention_heads head_dim"),
                "o_proj": _t("weight hidden_size attention_size"),
                "o_proj_bias": _t("f32 hidden_size", optional=True),
                "hidden_states": _t("f32 batch_size hidden_size", "inout"),
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
            "gate_up_silu",
            "intermediate = silu(gate_proj(x)) * up_proj(x) of x = rms_norm(hidden_states); gate rows before up rows.",
            {
                "hidden_states": _t("f32 batch_size hidden_size"),
                "post_attention_layernorm": _t("f32 hidden_size"),
                "gate_up_proj": _t("weight gate_up_size hidden_size"),
                "intermediate": _t("f32 batch_size intermediate_size", "out"),
            },
            {"rms_norm_eps": float},
            (("gate_up_size = 2 intermediate_size", lambda s: s["gate_up_size"] == 2 * s["intermediate_size"]),),
        ),
        Op(
            "down_proj_add",
            """hidden_states += down_proj(intermediate); with similarity_partials given, also <h, h'>, |h|^2 and |h'|^2
            of the residual stream before (h) and after (h'), one partial sum for each ``rows_per_partial`` channels.
            """,
            {
                "intermediate": _t("f32 batch_size intermediate_size"),
                "down_proj": _t("weight hidden_size intermediate_size"),
                "hidden_states": _t("f32 batch_size hidden_size", "inout"),
                "similarity_partials": _t("f32 num_partials batch_size three", "out", optional=True),
            },
            {"rows_per_partial": int},
            (),
        ),
        Op(
            "lm_head",
            "logits = lm_head(rms_norm(hidden_states)).",
            {
                "hidden_states": _t("f32 batch_size hidden_size"),
                "norm": _t("f32 hidden_size"),
                "lm_head": _t("weight vocab_size hidden_size"),
                "logits": _t("f32 batch_size vocab_size", "out"),
            },
            {"rms_norm_eps": float},
        ),
        Op(
            "sample",
            """next_token = argmax of the logits (temperature 0), or a draw from them.

            In transformers' order: repetition penalty on ``seen`` tokens, temperature, top-k (0: off), top-p (1: off),
            min-p (0: off). The draw is Gumbel-max with one Philox4x32-10 number per token id, keyed by (seed,
            generated): the same seed gives the same tokens on every executor, alone or in a batch. Where the largest
            score is NaN or infinite, the argmax is taken (the first NaN, where there is one).
            """,
            {
                "logits": _t("f32 batch_size vocab_size"),
                "seen": _t("u8 batch_size vocab_size"),
                "generated": _t("i32 batch_size"),
                "temperature": _t("f32 batch_size"),
                "top_k": _t("i32 batch_size"),
                "top_p": _t("f32 batch_size"),
                "min_p": _t("f32 batch_size"),
                "repetition_penalty": _t("f32 batch_size"),
                "seed": _t("i64 batch_size"),
                "next_token": _t("i32 batch_size", "out"),
            },
        ),
        Op(
            "advance",
            """Ends a row's step: records run_ffn and similarity under ``generated``, appends next_token to token_ids,
            moves seq_len and generated on, clears ``active`` at an end-of-sequence token, at max_new_tokens or when
            the cache is full, and arms run_ffn, similarity and skip_remaining for the next step. ``progress``, written
            last, tells the host (generated, active) of the row.
            """,
            {
                "next_token": _t("i32 batch_size"),
                "eos_token_ids": _t("i32 batch_size max_eos"),
                "max_new_tokens": _t("i32 batch_size"),
                "input_ids": _t("i32 batch_size", "out"),
                "token_ids": _t("i32 batch_size token_capacity", "inout", on_host=True),
                "seen": _t("u8 batch_size vocab_size", "inout"),
                "seq_len": _t("i32 batch_size", "inout"),
                "generated": _t("i32 batch_size", "inout"),
                "active": _t("i32 batch_size", "inout"),
                "skip_remaining": _t("i32 batch_size", "out"),
                "run_ffn": _t("i32 num_hidden_layers batch_size", "inout"),
                "similarity": _t("f32 num_hidden_layers batch_size", "inout"),
                "run_map": _t("u8 batch_size max_seq_len num_hidden_layers", "inout", on_host=True),
                "similarity_map": _t("f32 batch_size max_seq_len num_hidden_layers", "inout", on_host=True),
                "progress": _t("i32 batch_size two", "out", on_host=True),
            },
            {},
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

    ``sizes`` follows from the tensors. ``when`` is int32 [batch_size] on the program's device; a row runs where it is
    non-zero.
    """

    op: str
    tensors: dict[str, Any]  # torch.Tensor, or None for an absent optional operand
    scalars: dict[str, int | float]
    sizes: dict[str, int]
    when: torch.Tensor

    @property
    def rows(self) -> list[int]:
        """The rows this instruction acts on now."""
        return [int(row) for row in self.when.nonzero()[:, 0]]


def instruction(op_name: str, *, when: torch.Tensor, **operands: torch.Tensor | int | float | None) -> Instruction:
    """Builds a validated instruction: dtypes, symbolic shapes, contiguity, one device.

    Raises:
        ValueError: with the op, the field, the expected and the actual value.
    """
    op = OPS[op_name]
    known = set(op.tensors) | set(op.scalars)
    if unknown := set(operands) - known:
        raise ValueError(f"{op_name}: unknown operand {sorted(unknown)[0]!r}; it takes {', '.join(sorted(known))}")
    tensors: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    weight_dtype: torch.dtype | None = None
    for name, spec in op.tensors.items():
        tensor = operands.get(name)
        tensors[name] = tensor
        if tensor is None:
            if not spec.optional:
                raise ValueError(f"{op_name}: operand {name} is missing")
            continue
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{op_name}: {name} must be a tensor, got {type(tensor).__name__}")
        if spec.dtype == "weight":
            weight_dtype = weight_dtype or tensor.dtype
            if tensor.dtype not in WEIGHT_DTYPES or tensor.dtype != weight_dtype:
                raise ValueError(f"{op_name}: {name} has dtype {tensor.dtype}, expected {weight_dtype} as its fellows")
        elif tensor.dtype != _FIXED_DTYPES[spec.dtype]:
            raise ValueError(f"{op_name}: {name} has dtype {tensor.dtype}, expected {_FIXED_DTYPES[spec.dtype]}")
        if tensor.dim() != len(spec.shape):
            raise ValueError(f"{op_name}: {name} has shape {tuple(tensor.shape)}, expected ({', '.join(spec.shape)})")
        if not tensor.is_contiguous():
            raise ValueError(f"{op_name}: {name} is not contiguous (strides {tensor.stride()})")
        device = "cpu" if spec.on_host else when.device
        if tensor.device != torch.device(device):
            raise ValueError(f"{op_name}: {name} is on {tensor.device}, expected {device}")
        for symbol, size in zip(spec.shape, tensor.shape, strict=True):
            if sizes.setdefault(symbol, size) != size:
                raise ValueError(f"{op_name}: {name} has {symbol}={size}, expected {sizes[symbol]}")
    if when.dtype != torch.int32 or tuple(when.shape) != (sizes["batch_size"],):
        raise ValueError(f"{op_name}: when must be int32 [{sizes['batch_size']}], got {when.dtype} {list(when.shape)}")
    for text, holds in op.relations:
        if not holds(sizes):
            raise ValueError(f"{op_name}: sizes {sizes} break the relation: {text}")
    scalars: dict[str, int | float] = {}
    for name, kind in op.scalars.items():
        if name not in operands:
            raise ValueError(f"{op_name}: operand {name} is missing")
        scalars[name] = kind(operands[name])
    return Instruction(op_name, tensors, scalars, sizes, when)
