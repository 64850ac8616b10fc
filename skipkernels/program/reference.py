"""The reference implementation of every op, in PyTorch: it defines the semantics that all executors must meet.

One function per op, named as in ``program.table``, taking the instruction. Rows are computed one at a time in fp32, so
that a row's result cannot depend on its neighbours. Clarity is the only goal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from skipkernels.model.config import ACTIVATIONS, GATE_LIMIT, GATE_SLOPE
from skipkernels.model.matrix import dequantized, weight_rows
from skipkernels.program.philox import GATE_STREAM, SAMPLE_STREAM, philox_uniform
from skipkernels.program.state import (
    ADJUSTS_BIAS,
    ADJUSTS_COUNTS,
    ADJUSTS_MASK,
    DECODING,
    ENDED,
    WAITS_FOR_BLOCK,
    counted,
)
from skipkernels.program.table import OPS, Instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension; x itself where there is no weight."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + pairs) of x [..., head_dim] by the angles of cos and sin [..., pairs]; channels behind
    them stay."""
    pairs = cos.shape[-1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def softened(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap): no score is larger than cap (Gemma 2). 0 is no cap."""
    return x if cap == 0 else cap * torch.tanh(x / cap)


def softmax_with_sinks(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Shares [heads, ..., positions] of scores, beside those of one more score for each head [heads], which go nowhere
    (gpt-oss)."""
    if sinks is None:
        return scores.softmax(dim=-1)
    more = sinks.to(scores).view(-1, *[1] * (scores.dim() - 1)).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, more), dim=-1).softmax(dim=-1)[..., :-1]


ACTIVATION_BLOCK = 32
"""Activations that share a scale where they are in int8."""
SMALLEST_ACTIVATION = 1e-30
"""A block without a larger one is zero: 127 divided by it could be infinite."""


def int8_activations(x: torch.Tensor) -> torch.Tensor:
    """x [columns] as int8 with a scale per block represents it, in fp32 again."""
    blocks = x.view(-1, ACTIVATION_BLOCK)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest >= SMALLEST_ACTIVATION, 127 / largest, 0)
    return (torch.round(blocks * inverse) * (largest / 127)).view(-1)


def activations_for(ins: Instruction, matrix: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the instruction's ``matrix`` is multiplied with, in the place of x [columns]."""
    rounds = not isinstance(ins.tensors[matrix], torch.Tensor) and ins.activations == "int8"
    return int8_activations if rounds else lambda x: x


def linear(
    ins: Instruction, matrix: str, bias: torch.Tensor | None = None, rows: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Multiplies x [columns] with the instruction's ``matrix``, or with some ``rows`` of it, and adds ``bias``."""
    weights, activations = dequantized(ins.tensors[matrix]), activations_for(ins, matrix)
    weights = weights if rows is None else weights[rows]
    return lambda x: F.linear(activations(x), weights, bias)


def embed(ins: Instruction) -> None:
    t, s, scale = ins.tensors, ins.sizes, ins.scalars["scale"]
    for row in ins.rows:
        token = int(t["input_ids"][row])
        if token < 0:
            t["hidden_states"][row] = t["prompt_embeddings"][row - (s["num_rows"] - s["num_prompt_rows"])]
        else:
            t["hidden_states"][row] = weight_rows(t["embed_tokens"], torch.tensor([token]))[0].float() * scale


def skip_gate(ins: Instruction) -> None:
    t, layer = ins.tensors, int(ins.scalars["layer"])
    gated = [row for row in ins.rows if t["gate_mode"][row] and t["gated"][layer, row]]
    modes = {row: GATE_MODES[int(t["gate_mode"][row]) - 1] for row in gated}
    warm = {row: bool(t["num_generated"][row] >= t["warmup_tokens"][row]) for row in gated}
    _gate_by_similarity(ins, layer, {row: warm[row] for row in gated if modes[row] == "similarity"})
    for row in gated:
        if modes[row] == "similarity" or not warm[row]:
            continue
        draw = -1.0
        if modes[row] == "random":
            draw = float(philox_uniform(int(t["gate_seed"][row]), layer, int(t["num_generated"][row]), GATE_STREAM))
        if draw < float(t["gate_probability"][row]):
            t["run_ffn"][layer, row] = 0


def _gate_by_similarity(ins: Instruction, layer: int, warm: dict[int, bool]) -> None:
    """The sequences of ``warm`` (is each past its warm-up?) measure, trigger, and count their spans down."""
    t = ins.tensors
    triggered, spans = {}, {}
    for row in warm:
        controller = RatioController(ins, row) if t["target_ratio"][row] > 0 else None
        if controller and warm[row] and layer == t["first_gated"][row]:
            controller.adapt()
        triggered[row], spans[row] = False, int(t["gate_span"][row])
        if t["run_ffn"][layer - 1, row]:
            similarity = _cosine(t["similarity_partials"][:, row])
            t["similarity"][layer - 1, row] = similarity
            threshold = t["gate_threshold"][layer - 1, row]
            if controller:
                spans[row] = min(spans[row], controller.allowed)
                triggered[row] = warm[row] and controller.triggers(similarity, threshold)
            else:
                triggered[row] = warm[row] and bool(similarity >= threshold)
    for rule in BATCH_RULES:
        wanting = {row: triggered[row] for row in warm if BATCH_RULES[int(t["batch_rule"][row])] == rule}
        for row in _apply_batch_rule(rule, wanting, warm):
            t["skip_remaining"][row] = spans[row]
    for row in warm:
        if t["skip_remaining"][row] > 0:
            t["skip_remaining"][row] -= 1
            t["skipped"][row] += 1
            t["run_ffn"][layer, row] = 0


SCALE_GAIN = 0.25
"""Share by which threshold_scale grows in a token that is one token's FFNs behind."""
SCALE_BOUND = 2.0**20


class RatioController:
    """Holds one sequence's running skip ratio at ``target_ratio``, as ``program.table`` describes; fp32 throughout."""

    def __init__(self, ins: Instruction, row: int) -> None:
        t = ins.tensors
        self._scale, self._layers = t["threshold_scale"][row : row + 1], ins.sizes["num_hidden_layers"]
        self._target, self._warmup, self._ramp = (
            t[name][row] for name in ("target_ratio", "warmup_tokens", "ramp_tokens")
        )
        self._slack = _f32(self._layers) / 2
        self._owed_before = self._owed(int(t["num_generated"][row])) - t["skipped"][row]
        self._owed_now = self._owed(int(t["num_generated"][row]) + 1) - t["skipped"][row]

    def _owed(self, tokens: int) -> torch.Tensor:
        """FFNs to have been skipped after so many tokens."""
        return owed_after(tokens, self._target * self._layers, int(self._warmup), int(self._ramp))

    def adapt(self) -> None:
        self._scale.copy_(adapted_scale(self._scale, (self._owed_before / self._layers).clamp(-1, 1)))

    @property
    def allowed(self) -> int:
        """FFNs the row may still skip before it runs ahead too far."""
        return max(0, int(torch.floor(self._owed_now + self._slack)))

    def triggers(self, similarity: torch.Tensor, threshold: torch.Tensor) -> bool:
        behind = self._owed_now / self._slack
        if self.allowed == 0 or behind >= 1:
            return self.allowed > 0
        limit = (1 - threshold) * self._scale
        limit = limit * (1 + behind) if behind >= 0 else limit / (1 - behind)
        return bool(1 - similarity <= limit)


class NeuronController:
    """Holds one sequence's share of FFN bytes not read at ``neuron_target_ratio``, as ``program.table`` describes; fp32
    throughout."""

    STEER = 2.0

    def __init__(self, ins: Instruction, row: int) -> None:
        t, self._row = ins.tensors, row
        self._scale = t["threshold_scale"][row : row + 1]
        per_ffn = int(ins.scalars["ffn_bytes"])
        per_token = per_ffn * int(ins.scalars["num_hidden_layers"])
        unread = int(t["left_out"][row]) + per_ffn * int(t["skipped"][row])
        owed = owed_after(
            int(t["num_generated"][row]),
            t["neuron_target_ratio"][row] * _f32(per_token),
            int(t["warmup_tokens"][row]),
            int(t["ramp_tokens"][row]),
        )
        self._behind = ((owed - _f32(unread)) / _f32(per_token)).clamp(-1, 1)

    def adapt(self) -> torch.Tensor:
        """threshold_scale moves on; returns neuron_scale."""
        self._scale.copy_(adapted_scale(self._scale, self._behind))
        steer = self._behind * self.STEER
        return self._scale[0] * (1 + steer) if steer >= 0 else self._scale[0] / (1 - steer)


def adapted_scale(scale: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
    """threshold_scale for the token that begins, where what was owed before is ``behind`` of a token, in [-1, 1]."""
    return (scale * (1 + behind * SCALE_GAIN)).clamp(1 / SCALE_BOUND, SCALE_BOUND)


def owed_after(tokens: int, per_token: torch.Tensor, warmup: int, ramp: int) -> torch.Tensor:
    """What is to have been left out after so many tokens, ``per_token`` of each from ``ramp`` on."""
    if tokens >= ramp:
        return per_token * tokens
    return per_token * ramp * max(tokens - warmup, 0) / (ramp - warmup)


def neuron_gate(ins: Instruction) -> None:
    t = ins.tensors
    for row in ins.rows:
        tokens = int(t["num_generated"][row])
        if tokens < t["warmup_tokens"][row]:
            t["neuron_scale"][row] = 0.0
        elif t["neuron_target_ratio"][row] > 0:
            t["neuron_scale"][row] = NeuronController(ins, row).adapt()
        else:
            t["neuron_scale"][row] = t["threshold_scale"][row]
        t["scale_map"][row, tokens] = t["neuron_scale"][row]


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
    """The sequences of one batch rule that start skipping, given which of them want to."""
    wanting = [row for row, wants in triggered.items() if wants]
    if rule == "per_row":
        return wanting
    needed = len(triggered) if rule == "all" else len(triggered) // 2 + 1
    return list(triggered) if all(warm[row] for row in triggered) and len(wanting) >= needed else []


def qkv_rope_append(ins: Instruction) -> None:
    t, s, eps = ins.tensors, ins.sizes, float(ins.scalars["rms_norm_eps"])
    heads, kv_heads, head_dim = s["num_attention_heads"], s["num_key_value_heads"], s["head_dim"]
    qkv_proj = linear(ins, "qkv_proj", t["qkv_bias"])
    for row in ins.rows:
        x = rms_norm(t["hidden_states"][row], t["input_layernorm"], eps)
        qkv = qkv_proj(x).view(-1, head_dim)
        query, key, value = qkv.split([heads, kv_heads, kv_heads])
        query, key = rms_norm(query, t["q_norm"], eps), rms_norm(key, t["k_norm"], eps)
        _append(ins, row, query, key, value, _angles(ins, row))
        if t["query_scale"] is not None:
            t["query"][row] *= t["query_scale"][int(t["row_position"][row])]


def norm_rope_append(ins: Instruction) -> None:
    t, eps, head_dim = ins.tensors, float(ins.scalars["rms_norm_eps"]), ins.sizes["head_dim"]
    for row in ins.rows:
        position = int(t["row_position"][row])
        query, key, value = t["qkv"][row].split([len(t["q_norm"]), len(t["k_norm"]), len(t["k_norm"])])
        query, key = rms_norm(query, t["q_norm"], eps), rms_norm(key, t["k_norm"], eps)
        query, key, value = (each.view(-1, head_dim) for each in (query, key, value))
        _append(ins, row, query, key, value, (t["rope_cos"][position], t["rope_sin"][position]))
        t["qkv"][row] = 0


def _append(
    ins: Instruction,
    row: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Rotates query and key [heads, head_dim]; key and value go into the caches at the row's position."""
    t = ins.tensors
    block, offset = _place(ins, row, torch.tensor([int(t["row_position"][row])]))
    t["query"][row] = apply_rope(query, *angles)
    t["k_cache"][block[0], :, offset[0]] = apply_rope(key, *angles).to(t["k_cache"].dtype)
    t["v_cache"][block[0], :, offset[0]] = value.to(t["v_cache"].dtype)


def _angles(ins: Instruction, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [rotary_pairs] of a row's position, or of its three positions."""
    t, s = ins.tensors, ins.sizes
    if t["position_axes"] is None or row < s["num_sequences"]:
        position = int(t["row_position"][row])
        return t["rope_cos"][position], t["rope_sin"][position]
    positions = t["prompt_positions"][row - s["num_sequences"]][t["position_axes"].long()].long()
    pairs = torch.arange(s["rotary_pairs"])
    cos, sin = (t[name][positions.abs(), pairs] for name in ("rope_cos", "rope_sin"))
    return cos, torch.where(positions < 0, -sin, sin)


def _place(ins: Instruction, row: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block and offset of positions i64 [n] of the row's own sequence."""
    t, size = ins.tensors, ins.sizes["block_size"]
    return t["block_table"][int(t["row_sequence"][row])][positions // size].long(), positions % size


def decode_attention(ins: Instruction) -> None:
    t, s = ins.tensors, ins.sizes
    groups = s["num_attention_heads"] // s["num_key_value_heads"]
    window = int(ins.scalars["sliding_window"])
    for row in ins.rows:
        end = int(t["row_position"][row]) + 1
        block, offset = _place(ins, row, torch.arange(max(0, end - window) if window else 0, end))
        keys, values = (
            t[cache][block, :, offset].float().repeat_interleave(groups, dim=1) for cache in ("k_cache", "v_cache")
        )
        scores = torch.einsum("hd,phd->hp", t["query"][row], keys) * ins.scalars["scaling"]
        scores = softened(scores, ins.scalars["softcap"])
        t["attn_output"][row] = torch.einsum("hp,phd->hd", softmax_with_sinks(scores, t["sinks"]), values)


def o_proj_add(ins: Instruction) -> None:
    t = ins.tensors
    o_proj = linear(ins, "o_proj", t["o_proj_bias"])
    for row in ins.rows:
        t["hidden_states"][row] += o_proj(t["attn_output"][row].flatten())


def activation_of(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The gate's activation, one of ``ACTIVATIONS``."""
    if name == "clamped_swiglu":
        return lambda gate: gate.clamp(max=GATE_LIMIT) * torch.sigmoid(GATE_SLOPE * gate.clamp(max=GATE_LIMIT))
    return F.silu if name == "silu" else partial(F.gelu, approximate="tanh")


def up_factor(name: str, up: torch.Tensor) -> torch.Tensor:
    """What the activated gate is multiplied with: up; of clamped_swiglu, up within the limit, and 1 more."""
    return up.clamp(-GATE_LIMIT, GATE_LIMIT) + 1 if name == "clamped_swiglu" else up


def gated(name: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """act(gate) * up, or what goes in the place of up."""
    return activation_of(name)(gate) * up_factor(name, up)


def gate_up_act(ins: Instruction) -> None:
    t, gate_up_proj = ins.tensors, linear(ins, "gate_up_proj")
    activation = ACTIVATIONS[int(ins.scalars["activation"])]
    for row in ins.rows:
        x = rms_norm(t["hidden_states"][row], t["post_attention_layernorm"], float(ins.scalars["rms_norm_eps"]))
        t["intermediate"][row] = gated(activation, *gate_up_proj(x).chunk(2))


def down_proj_add(ins: Instruction) -> None:
    down_proj = linear(ins, "down_proj")
    for row in ins.rows:
        _add_and_compare(ins, row, down_proj(ins.tensors["intermediate"][row]))


def _add_and_compare(ins: Instruction, row: int, branch: torch.Tensor) -> None:
    t = ins.tensors
    before = t["hidden_states"][row].clone()
    after = before + branch
    t["hidden_states"][row] = after
    partials = t["similarity_partials"]
    if partials is not None and row < ins.sizes["num_sequences"]:
        size = int(ins.scalars["rows_per_partial"])
        products = torch.stack((before * after, before * before, after * after), dim=-1)
        partials[:, row] = torch.stack([chunk.sum(0) for chunk in products.split(size)])


def branch_add(ins: Instruction) -> None:
    t = ins.tensors
    for row in ins.rows:
        change = rms_norm(t["branch"][row].clone(), t["norm"], float(ins.scalars["rms_norm_eps"]))
        _add_and_compare(ins, row, change * float(ins.scalars["multiplier"]))
        t["branch"][row] = 0


def route_experts(ins: Instruction) -> None:
    t, router = ins.tensors, linear(ins, "router", ins.tensors["router_bias"])
    for row in ins.rows:
        x = rms_norm(t["hidden_states"][row], t["post_attention_layernorm"], float(ins.scalars["rms_norm_eps"]))
        t["router_logits"][row] = router(x)
    choose_experts(ins)


def choose_experts(ins: Instruction) -> None:
    """Of ``route_experts``, behind its logits."""
    t, s, pairs = ins.tensors, ins.sizes, []
    for row in ins.rows:
        logits = t["router_logits"][row]
        order = torch.sort(logits, descending=True, stable=True).indices[: s["experts_per_token"]]
        weights = logits.softmax(0)[order]
        t["expert_ids"][row] = order
        t["expert_weights"][row] = weights / weights.sum() if ins.scalars["norm_topk_prob"] else weights
        pairs += [(expert, row * s["experts_per_token"] + choice) for choice, expert in enumerate(order.tolist())]
    # without a row of its own, an empty list: torch takes it for floats
    t["expert_pairs"][: len(pairs)] = torch.tensor([pair for _, pair in sorted(pairs)], dtype=torch.int64)
    experts = torch.tensor([expert for expert, _ in pairs], dtype=torch.int64)
    counts = torch.bincount(experts, minlength=s["num_experts"])
    t["expert_begins"][0] = 0
    t["expert_begins"][1:] = counts.cumsum(0)
    t["experts_read"][int(ins.scalars["layer"])] += int((counts > 0).sum())


def choices_by_expert(ins: Instruction) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Each chosen expert, and the (row, choice) that it was for, in ascending order."""
    begins, pairs = ins.tensors["expert_begins"].tolist(), ins.tensors["expert_pairs"].tolist()
    for expert, (begin, end) in enumerate(pairwise(begins)):
        if begin < end:
            yield expert, [divmod(pair, ins.sizes["experts_per_token"]) for pair in pairs[begin:end]]


def experts_gate_up_act(ins: Instruction) -> None:
    t, size = ins.tensors, 2 * ins.sizes["expert_size"]
    activation = ACTIVATIONS[int(ins.scalars["activation"])]
    gate_up_proj = linear(ins, "gate_up_proj", t["gate_up_bias"])
    products = {
        row: gate_up_proj(
            rms_norm(t["hidden_states"][row], t["post_attention_layernorm"], float(ins.scalars["rms_norm_eps"]))
        )
        for row in ins.rows
    }
    for expert, choices in choices_by_expert(ins):
        for row, choice in choices:
            gate, up = products[row][expert * size : (expert + 1) * size].chunk(2)
            gate, up = activation_of(activation)(gate), up_factor(activation, up)
            if t["gate_thresholds"] is not None:
                layer = int(ins.scalars["layer"])
                gate[gate.abs() < t["gate_thresholds"][t["row_sequence"][row], layer] * t["neuron_scale"][row]] = 0.0
                up = torch.where(gate == 0, 0.0, up)  # not read
            t["expert_intermediate"][row, choice] = gate * up


def experts_down_proj_add(ins: Instruction) -> None:
    t, size = ins.tensors, ins.sizes["hidden_size"]
    down_proj = linear(ins, "down_proj", t["down_proj_bias"])
    branches = {row: torch.zeros(size) for row in ins.rows}
    for expert, choices in choices_by_expert(ins):
        for row, choice in choices:
            outputs = down_proj(t["expert_intermediate"][row, choice])[expert * size : (expert + 1) * size]
            branches[row] += t["expert_weights"][row, choice] * outputs
    for row, branch in branches.items():
        _add_and_compare(ins, row, branch)


def experts_down_proj_neurons_add(ins: Instruction) -> None:
    t, size, hidden = ins.tensors, ins.sizes["expert_size"], ins.sizes["hidden_size"]
    down_proj = dequantized(t["down_proj"])
    bias = torch.zeros((ins.sizes["num_begins"] - 1) * hidden) if t["down_proj_bias"] is None else t["down_proj_bias"]
    branches = {row: torch.zeros(hidden) for row in ins.rows}
    for expert, choices in choices_by_expert(ins):
        of_expert = down_proj[expert * size : (expert + 1) * size]
        own_bias = bias[expert * hidden : (expert + 1) * hidden]
        for row, choice in choices:
            products = t["expert_intermediate"][row, choice]
            kept = products != 0
            branches[row] += t["expert_weights"][row, choice] * (products[kept] @ of_expert[kept] + own_bias)
    for row, branch in branches.items():
        _add_and_compare(ins, row, branch)


def gate_proj_act(ins: Instruction) -> None:
    t, gate_proj = ins.tensors, linear(ins, "gate_proj")
    activate = activation_of(ACTIVATIONS[int(ins.scalars["activation"])])
    for row in ins.rows:
        x = rms_norm(t["hidden_states"][row], t["post_attention_layernorm"], float(ins.scalars["rms_norm_eps"]))
        t["intermediate"][row] = activate(gate_proj(x))


def select_neurons(ins: Instruction) -> None:
    """The definition of what is kept: |value| >= threshold * neuron_scale, in fp32. What a policy's a_l and scales make
    of the threshold is settled before, in ``state.gate_thresholds_of``."""
    t, layer, stage = ins.tensors, int(ins.scalars["layer"]), int(ins.scalars["stage"])
    size = ins.sizes["intermediate_size"]
    kept = torch.zeros(size, dtype=torch.bool)
    for row in ins.rows:
        values = t["intermediate"][row]
        thresholds = t["neuron_thresholds"][t["row_sequence"][row], layer] * t["neuron_scale"][row]
        values[values.abs() < thresholds] = 0.0
        kept |= values != 0
        if row < ins.sizes["num_sequences"]:
            count = int((values != 0).sum())
            t["kept_map"][row, t["num_generated"][row], layer, stage] = count
            t["left_out"][row] += (size - count) * int(ins.scalars["neuron_bytes"])
    chosen = kept.nonzero()[:, 0]
    t["neurons"][: len(chosen)] = chosen
    t["num_neurons"][0] = len(chosen)


def listed_neurons(ins: Instruction) -> torch.Tensor:
    """The instruction's list, i64; every neuron where it has none."""
    neurons, number = ins.tensors["neurons"], ins.tensors["num_neurons"]
    return torch.arange(ins.sizes["intermediate_size"]) if neurons is None else neurons[: int(number)].long()


def up_proj_mul(ins: Instruction) -> None:
    t, chosen = ins.tensors, listed_neurons(ins)
    up_proj = linear(ins, "up_proj", rows=chosen)
    for row in ins.rows:
        x = rms_norm(t["hidden_states"][row], t["post_attention_layernorm"], float(ins.scalars["rms_norm_eps"]))
        gate = t["intermediate"][row, chosen]
        t["intermediate"][row, chosen] = torch.where(gate == 0, 0.0, gate * up_proj(x))


def down_proj_neurons_add(ins: Instruction) -> None:
    t, chosen = ins.tensors, listed_neurons(ins)
    down_proj, activations = dequantized(t["down_proj"]), activations_for(ins, "down_proj")
    for row in ins.rows:
        own = chosen[t["intermediate"][row, chosen] != 0]
        _add_and_compare(ins, row, activations(t["intermediate"][row])[own] @ down_proj[own])


def lm_head(ins: Instruction) -> None:
    t, head = ins.tensors, linear(ins, "lm_head")
    for row in ins.rows:
        x = rms_norm(t["hidden_states"][row], t["norm"], float(ins.scalars["rms_norm_eps"]))
        t["logits"][row] = softened(head(x), ins.scalars["softcap"])


def sample(ins: Instruction) -> None:
    t = ins.tensors
    for row in ins.rows:
        token = t["next_token"][row] = chosen_token(t, row)
        if count := int(t["num_logprobs"][row]):
            logprobs = t["logits"][row].double().log_softmax(0).float()
            step = int(t["num_generated"][row])
            top = torch.sort(t["logits"][row], descending=True, stable=True).indices[: count - 1].int()
            t["logprobs"][row, step, 0] = logprobs[token]
            t["logprobs"][row, step, 1 : 1 + len(top)] = logprobs[top]
            t["top_tokens"][row, step, : len(top)] = top


def chosen_token(t: dict[str, torch.Tensor], row: int) -> int:
    """Of one row of ``sample``."""
    scores = adjusted_scores(t, row)
    temperature = t["temperature"][row]
    if temperature == 0:
        return int(scores.argmax())
    scores = scores / temperature
    if not scores.max().isfinite():  # nothing to draw from: NaN, or an infinite score
        return int(scores.argmax())
    keep = kept_tokens(scores, int(t["top_k"][row]), float(t["top_p"][row]), float(t["min_p"][row]))
    ids = keep.nonzero()[:, 0]
    uniform = philox_uniform(int(t["seed"][row]), ids.numpy(), int(t["num_generated"][row]), SAMPLE_STREAM)
    gumbel = -torch.log(-torch.log(torch.from_numpy(uniform)))
    return int(ids[(scores[ids].double() + gumbel).argmax()])


def adjusted_scores(t: dict[str, torch.Tensor], row: int) -> torch.Tensor:
    """Scores [vocab] before the temperature."""
    scores, seen, adjusts = t["logits"][row], t["seen"][row], int(t["adjusts"][row])
    if adjusts & ADJUSTS_BIAS:
        scores = scores + t["logit_bias"][row]
    scores = penalised_scores(scores, seen, t["repetition_penalty"][row])
    if adjusts & ADJUSTS_COUNTS:
        times = (seen >> 1).float()
        fewer = scores - times * t["frequency_penalty"][row] - t["presence_penalty"][row]
        scores = torch.where(times > 0, fewer, scores)
    if adjusts & ADJUSTS_MASK:
        allowed = (t["token_mask"][row][:, None] >> torch.arange(32)) & 1
        scores = torch.where(allowed.flatten()[: scores.numel()] != 0, scores, -math.inf)
    return scores


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
        if row >= s["num_sequences"]:
            t["active"][row] = 0
            t["run_ffn"][:, row] = 0
            continue
        step, token = int(t["num_generated"][row]), t["next_token"][row]
        t["run_map"][row, step] = (t["run_ffn"][:, row] != 0).to(torch.uint8)
        t["similarity_map"][row, step] = t["similarity"][:, row]
        t["row_position"][row] += 1
        t["num_generated"][row] += 1
        position = int(t["row_position"][row])
        t["token_ids"][row, position] = token
        t["input_ids"][row] = token
        t["seen"][row, token] = counted(int(t["seen"][row, token]))
        ended = bool(
            (t["eos_token_ids"][row] == token).any()
            or t["num_generated"][row] >= t["max_new_tokens"][row]
            or position >= s["max_seq_len"]
        )
        waits = not ended and bool(t["block_table"][row, position // int(ins.scalars["block_size"])] < 0)
        t["active"][row] = 0 if ended or waits else 1
        t["run_ffn"][:, row] = 0 if ended or waits else 1
        t["similarity"][:, row] = float("nan")
        t["skip_remaining"][row] = 0
        t["progress"][row, 0] = t["num_generated"][row]
        t["progress"][row, 1] = ENDED if ended else WAITS_FOR_BLOCK if waits else DECODING


REFERENCE: dict[str, Callable[[Instruction], None]] = {name: globals()[name] for name in OPS}
