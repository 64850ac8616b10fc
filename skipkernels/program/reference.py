"""The reference implementation of every op, in PyTorch: it defines the semantics that all executors must meet.

One function per op, named as in ``program.table``, taking the instruction. Rows are computed one at a time in fp32, so
that a row's result cannot depend on its neighbours. Clarity is the only goal.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from skipkernels.program.philox import GATE_STREAM, SAMPLE_STREAM, philox_uniform
from skipkernels.program.table import OPS, Instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + head_dim/2) of x [..., head_dim] by the angles of cos and sin [..., head_dim/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def embed(ins: Instruction) -> None:
    t = ins.tensors
    for row in ins.rows:
        t["hidden_states"][row] = t["embed_tokens"][t["input_ids"][row]].float()


def skip_gate(ins: Instruction) -> None:
    t, p = ins.tensors, ins.scalars
    layer, rows, mode = int(p["layer"]), ins.rows, GATE_MODES[int(p["mode"])]
    warm = {row: int(t["generated"][row]) >= p["warmup_tokens"] for row in rows}
    if mode == "similarity":
        triggered, spans = {}, {}
        for row in rows:
            controller = RatioController(ins, row) if p["target_ratio"] > 0 else None
            if controller and warm[row] and p["first_gate"]:
                controller.adapt()
            triggered[row], spans[row] = False, int(p["span"])
            if t["run_ffn"][layer - 1, row]:
                similarity = _cosine(t["similarity_partials"][:, row])
                t["similarity"][layer - 1, row] = similarity
                if controller:
                    spans[row] = min(spans[row], controller.allowed)
                    triggered[row] = warm[row] and controller.triggers(similarity)
                else:
                    triggered[row] = warm[row] and bool(similarity >= p["threshold"])
        for row in _apply_batch_rule(BATCH_RULES[int(p["batch_rule"])], triggered, warm):
            t["skip_remaining"][row] = spans[row]
        for row in rows:
            if t["skip_remaining"][row] > 0:
                t["skip_remaining"][row] -= 1
                t["skipped"][row] += 1
                t["run_ffn"][layer, row] = 0
        return
    for row in rows:
        if not warm[row]:
            continue
        draw = 0.0
        if mode == "random":
            draw = float(philox_uniform(int(p["seed"]), layer, int(t["generated"][row]), GATE_STREAM))
        if draw < p["probability"]:
            t["run_ffn"][layer, row] = 0


class RatioController:
    """Holds one row's running skip ratio at ``target_ratio``, as ``program.table`` describes; fp32 throughout."""

    GAIN = 0.25
    """Share by which threshold_scale grows in a token that is one token's FFNs behind."""
    SCALE_BOUND = 2.0**20

    def __init__(self, ins: Instruction, row: int) -> None:
        t, p = ins.tensors, ins.scalars
        self._p, self._scale, self._layers = p, t["threshold_scale"][row : row + 1], ins.sizes["num_hidden_layers"]
        self._slack = _f32(self._layers) / 2
        self._owed_before = self._owed(int(t["generated"][row])) - t["skipped"][row]
        self._owed_now = self._owed(int(t["generated"][row]) + 1) - t["skipped"][row]

    def _owed(self, tokens: int) -> torch.Tensor:
        """FFNs to have been skipped after so many tokens."""
        warmup, ramp = int(self._p["warmup_tokens"]), int(self._p["ramp_tokens"])
        per_token = _f32(self._p["target_ratio"]) * self._layers
        if tokens >= ramp:
            return per_token * tokens
        return per_token * ramp * max(tokens - warmup, 0) / (ramp - warmup)

    def adapt(self) -> None:
        behind = (self._owed_before / self._layers).clamp(-1, 1)
        self._scale.copy_((self._scale * (1 + behind * self.GAIN)).clamp(1 / self.SCALE_BOUND, self.SCALE_BOUND))

    @property
    def allowed(self) -> int:
        """FFNs the row may still skip before it runs ahead too far."""
        return max(0, int(torch.floor(self._owed_now + self._slack)))

    def triggers(self, similarity: torch.Tensor) -> bool:
        behind = self._owed_now / self._slack
        if self.allowed == 0 or behind >= 1:
            return self.allowed > 0
        limit = (1 - _f32(self._p["threshold"])) * self._scale
        limit = limit * (1 + behind) if behind >= 0 else limit / (1 - behind)
        return bool(1 - similarity <= limit)


def _f32(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _cosine(partials: torch.Tensor) -> torch.Tensor:
    """Cosine from partial sums [partials, 3], added in their order; a zero vector has similarity 0."""
    dot, before, after = torch.zeros(3)
    for part in partials:
        dot, before, after = dot + part[0], before + part[1], after + part[2]
    norm = torch.sqrt(before) * torch.sqrt(after)
    return dot / norm if norm > 0 else torch.zeros(())


def _apply_batch_rule(rule: str, triggered: dict[int, bool], warm: dict[int, bool]) -> list[int]:
    """The rows that start skipping, given the rows that want to."""
    wanting = [row for row, wants in triggered.items() if wants]
    if rule == "per_row":
        return wanting
    needed = len(triggered) if rule == "all" else len(triggered) // 2 + 1
    return list(triggered) if all(warm.values()) and len(wanting) >= needed else []


def qkv_rope_append(ins: Instruction) -> None:
    t, s, eps = ins.tensors, ins.sizes, float(ins.scalars["rms_norm_eps"])
    heads, kv_heads, head_dim = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
    bias = t["qkv_bias"]
    for row in ins.rows:
        x = rms_norm(t["hidden_states"][row], t["input_layernorm"], eps)
        qkv = F.linear(x, t["qkv_proj"].float(), bias).view(-1, head_dim)
        query, key, value = qkv.split([heads, kv_heads, kv_heads])
        if t["q_norm"] is not None:
            query = rms_norm(query, t["q_norm"], eps)
        if t["k_norm"] is not None:
            key = rms_norm(key, t["k_norm"], eps)
        position = int(t["seq_len"][row])
        cos, sin = t["rope_cos"][position], t["rope_sin"][position]
        t["query"][row] = apply_rope(query, cos, sin)
        t["k_cache"][row, :, position] = apply_rope(key, cos, sin).to(t["k_cache"].dtype)
        t["v_cache"][row, :, position] = value.to(t["v_cache"].dtype)


def decode_attention(ins: Instruction) -> None:
    t, s = ins.tensors, ins.sizes
    groups = s["num_attention_heads"] // s["num_key_value_heads"]
    window = int(ins.scalars["sliding_window"])
    for row in ins.rows:
        end = int(t["seq_len"][row]) + 1
        begin = max(0, end - window) if window else 0
        keys = t["k_cache"][row, :, begin:end].float().repeat_interleave(groups, dim=0)
        values = t["v_cache"][row, :, begin:end].float().repeat_interleave(groups, dim=0)
        scores = torch.einsum("hd,hpd->hp", t["query"][row], keys) * ins.scalars["scaling"]
        t["attn_output"][row] = torch.einsum("hp,hpd->hd", scores.softmax(dim=-1), values)


def o_proj_add(ins: Instruction) -> None:
    t = ins.tensors
    bias = t["o_proj_bias"]
    for row in ins.rows:
        t["hidden_states"][row] += F.linear(t["attn_output"][row].flatten(), t["o_proj"].float(), bias)


def gate_up_silu(ins: Instruction) -> None:
    t = ins.tensors
    for row in ins.rows:
        x = rms_norm(t["hidden_states"][row], t["post_attention_layernorm"], float(ins.scalars["rms_norm_eps"]))
        gate, up = F.linear(x, t["gate_up_proj"].float()).chunk(2)
        t["intermediate"][row] = F.silu(gate) * up


def down_proj_add(ins: Instruction) -> None:
    t = ins.tensors
    partials = t["similarity_partials"]
    for row in ins.rows:
        before = t["hidden_states"][row].clone()
        after = before + F.linear(t["intermediate"][row], t["down_proj"].float())
        t["hidden_states"][row] = after
        if partials is not None:
            size = int(ins.scalars["rows_per_partial"])
            products = torch.stack((before * after, before * before, after * after), dim=-1)
            partials[:, row] = torch.stack([chunk.sum(0) for chunk in products.split(size)])


def lm_head(ins: Instruction) -> None:
    t = ins.tensors
    for row in ins.rows:
        x = rms_norm(t["hidden_states"][row], t["norm"], float(ins.scalars["rms_norm_eps"]))
        t["logits"][row] = F.linear(x, t["lm_head"].float())


def sample(ins: Instruction) -> None:
    t = ins.tensors
    for row in ins.rows:
        scores = penalised_scores(t["logits"][row], t["seen"][row], t["repetition_penalty"][row])
        temperature = t["temperature"][row]
        if temperature == 0:
            t["next_token"][row] = int(scores.argmax())
            continue
        scores = scores / temperature
        if not scores.max().isfinite():  # nothing to draw from: NaN, or an infinite score
            t["next_token"][row] = int(scores.argmax())
            continue
        keep = kept_tokens(scores, int(t["top_k"][row]), float(t["top_p"][row]), float(t["min_p"][row]))
        ids = keep.nonzero()[:, 0]
        uniform = philox_uniform(int(t["seed"][row]), ids.numpy(), int(t["generated"][row]), SAMPLE_STREAM)
        gumbel = -torch.log(-torch.log(torch.from_numpy(uniform)))
        t["next_token"][row] = int(ids[(scores[ids].double() + gumbel).argmax()])


def penalised_scores(logits: torch.Tensor, seen: torch.Tensor, penalty: torch.Tensor) -> torch.Tensor:
    """Logits [vocab] with those of seen tokens divided by ``penalty`` where positive, multiplied where negative."""
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen.bool(), penalised, logits)


def kept_tokens(scores: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Mask [vocab] of the tokens that survive top-k, then top-p, then min-p. Ties at the top-k edge are all kept;
    in top-p, equal scores count in the order of their ids."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < scores.numel():
        keep = scores >= scores.topk(top_k).values[-1]
    if top_p < 1.0:
        ids = keep.nonzero()[:, 0]
        order = ids[torch.sort(scores[ids], descending=True, stable=True).indices]
        weights = torch.exp(scores[order].double() - scores[order[0]].double())
        before = weights.cumsum(0) - weights
        keep = torch.zeros_like(keep)
        keep[order[before < top_p * weights.sum()]] = True
    if min_p > 0.0:
        keep &= scores.double() >= scores.max().double() + math.log(min_p)
    return keep


def advance(ins: Instruction) -> None:
    t, s = ins.tensors, ins.sizes
    for row in ins.rows:
        step, token = int(t["generated"][row]), t["next_token"][row]
        t["run_map"][row, step] = (t["run_ffn"][:, row] != 0).to(torch.uint8)
        t["similarity_map"][row, step] = t["similarity"][:, row]
        t["seq_len"][row] += 1
        t["generated"][row] += 1
        t["token_ids"][row, t["seq_len"][row]] = token
        t["input_ids"][row] = token
        t["seen"][row, token] = 1
        done = bool(
            (t["eos_token_ids"][row] == token).any()
            or t["generated"][row] >= t["max_new_tokens"][row]
            or t["seq_len"][row] >= s["max_seq_len"]
        )
        t["active"][row] = 0 if done else 1
        t["run_ffn"][:, row] = 0 if done else 1
        t["similarity"][:, row] = float("nan")
        t["skip_remaining"][row] = 0
        t["progress"][row, 0] = t["generated"][row]
        t["progress"][row, 1] = t["active"][row]


REFERENCE: dict[str, Callable[[Instruction], None]] = {name: globals()[name] for name in OPS}
