"""skip_gate: similarity, a fixed set or a random draw -> run_ffn of a layer, per row.

One program decides for the whole batch. Every operation is one fp32 rounding, as in ``RatioController`` of
``program.reference``: divisions and roots are correctly rounded ones, and nothing is contracted into a multiply-add.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.philox import GATE_STREAM, philox_uniform
from skipkernels.kernels.triton.rows import wanted_rows
from skipkernels.program.reference import RatioController
from skipkernels.program.table import Instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES

SIMILARITY = tl.constexpr(GATE_MODES.index("similarity"))
RANDOM = tl.constexpr(GATE_MODES.index("random"))
PER_ROW = tl.constexpr(BATCH_RULES.index("per_row"))
ALL = tl.constexpr(BATCH_RULES.index("all"))
GAIN = tl.constexpr(RatioController.GAIN)
SCALE_BOUND = tl.constexpr(RatioController.SCALE_BOUND)

PARTIALS_TOGETHER = 64
"""Partial sums on their way from memory at once: they are added one after the other, but need not come so."""


@triton.jit
def cosine(similarity_partials, rows, wanted, batch_size, num_partials: tl.constexpr, PARTIALS_TOGETHER: tl.constexpr):
    """<h, h'> / (|h| |h'|) [BLOCK_BATCH] from its partial sums, added in their order; 0 for a zero vector."""
    which = tl.arange(0, 4)[None, :]
    mask = wanted[:, None] & (which < 3)
    sums = tl.zeros(mask.shape, tl.float32)
    for start in range(0, num_partials, PARTIALS_TOGETHER):
        for offset in tl.static_range(PARTIALS_TOGETHER):
            partial = start + offset + tl.zeros_like(rows)[:, None]
            at = similarity_partials + (partial * batch_size + rows[:, None]) * 3 + which
            sums += tl.load(at, mask=mask & (partial < num_partials), other=0.0)
    dot = tl.sum(tl.where(which == 0, sums, 0.0), axis=1)
    before = tl.sum(tl.where(which == 1, sums, 0.0), axis=1)
    after = tl.sum(tl.where(which == 2, sums, 0.0), axis=1)
    norm = tl.sqrt_rn(before) * tl.sqrt_rn(after)
    return tl.where(norm > 0, tl.div_rn(dot, tl.where(norm > 0, norm, 1.0)), 0.0)


@triton.jit
def owed(tokens, per_token, warmup_tokens, ramp_tokens):
    """FFNs to have been skipped after so many tokens."""
    past_warmup = tl.maximum(tokens - warmup_tokens, 0).to(tl.float32)
    ramp = (ramp_tokens - warmup_tokens).to(tl.float32)
    on_ramp = tl.div_rn(per_token * ramp_tokens.to(tl.float32) * past_warmup, ramp + tl.zeros_like(past_warmup))
    return tl.where(tokens >= ramp_tokens, per_token * tokens.to(tl.float32), on_ramp)


@triton.jit
def clamp(value, low, high):
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit(do_not_specialize=["batch_size", "layer", "span", "warmup_tokens", "seed", "ramp_tokens"])
def skip_gate_kernel(
    run_ffn,
    skip_remaining,
    similarity,
    similarity_partials,
    generated,
    skipped,
    threshold_scale,
    when,
    batch_size,
    layer,
    threshold,
    span,
    warmup_tokens,
    probability,
    seed,
    target_ratio,
    ramp_tokens,
    num_hidden_layers: tl.constexpr,
    num_partials: tl.constexpr,
    mode: tl.constexpr,
    batch_rule: tl.constexpr,
    first_gate: tl.constexpr,
    HOLDS_RATIO: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    PARTIALS_TOGETHER: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(when, batch_size, BLOCK_BATCH)
    if not any_wanted:
        return
    tokens = tl.load(generated + rows, mask=wanted, other=0)
    warm = tokens >= warmup_tokens
    skips = run_ffn + layer * batch_size + rows
    if mode != SIMILARITY:
        chosen = wanted & warm
        if mode == RANDOM:
            draws = philox_uniform(seed, tl.zeros_like(rows) + layer // 4, tokens, GATE_STREAM)
            draw = tl.sum(tl.where(tl.arange(0, 4)[None, :] == layer % 4, draws, 0.0), axis=1)
            chosen &= draw < tl.full([BLOCK_BATCH], probability, tl.float32).to(tl.float64)
        else:
            chosen &= probability > 0
        tl.store(skips, tl.zeros_like(rows), mask=chosen)
        return

    tested = (layer - 1) * batch_size + rows
    ran = tl.load(run_ffn + tested, mask=wanted, other=0) != 0
    found = cosine(similarity_partials, rows, ran, batch_size, num_partials, PARTIALS_TOGETHER)
    tl.store(similarity + tested, found, mask=ran)
    spans = tl.zeros_like(rows) + span
    if HOLDS_RATIO:
        layers = tl.full([BLOCK_BATCH], num_hidden_layers, tl.float32)
        per_token = tl.full([BLOCK_BATCH], target_ratio, tl.float32) * layers
        slack = layers * 0.5
        so_far = tl.load(skipped + rows, mask=wanted, other=0).to(tl.float32)
        scale = tl.load(threshold_scale + rows, mask=wanted, other=1.0)
        if first_gate:
            owed_before = owed(tokens, per_token, warmup_tokens, ramp_tokens) - so_far
            behind = clamp(tl.div_rn(owed_before, layers), -1.0, 1.0)
            scale = tl.where(warm, clamp(scale * (1.0 + behind * GAIN), 1.0 / SCALE_BOUND, SCALE_BOUND), scale)
            tl.store(threshold_scale + rows, scale, mask=wanted)
        owed_now = owed(tokens + 1, per_token, warmup_tokens, ramp_tokens) - so_far
        behind = tl.div_rn(owed_now, slack)
        allowed = tl.maximum(tl.floor(owed_now + slack), 0.0).to(tl.int32)
        limit = (1.0 - tl.full([BLOCK_BATCH], threshold, tl.float32)) * scale
        limit = tl.where(behind >= 0, limit * (1.0 + behind), tl.div_rn(limit, 1.0 - tl.minimum(behind, 0.0)))
        triggers = (allowed > 0) & ((behind >= 1.0) | (1.0 - found <= limit))
        spans = tl.minimum(spans, allowed)
    else:
        triggers = found >= tl.full([BLOCK_BATCH], threshold, tl.float32)
    triggers &= warm & ran

    if batch_rule != PER_ROW:
        voters = tl.sum(wanted.to(tl.int32), axis=0)
        wanting = tl.sum(triggers.to(tl.int32), axis=0)
        vetoes = tl.sum((wanted & ~warm).to(tl.int32), axis=0)
        needed = voters if batch_rule == ALL else voters // 2 + 1
        triggers = wanted & (vetoes == 0) & (wanting >= needed)
    remaining = tl.load(skip_remaining + rows, mask=wanted, other=0)
    remaining = tl.where(triggers, spans, remaining)
    skipping = wanted & (remaining > 0)
    tl.store(skip_remaining + rows, remaining - skipping.to(tl.int32), mask=wanted)
    tl.store(skipped + rows, tl.load(skipped + rows, mask=skipping) + 1, mask=skipping)
    tl.store(skips, tl.zeros_like(rows), mask=skipping)


def skip_gate(ins: Instruction) -> tuple[Launch, ...]:
    blocks = {
        "HOLDS_RATIO": ins.scalars["target_ratio"] > 0,
        "BLOCK_BATCH": triton.next_power_of_2(ins.sizes["batch_size"]),
        "PARTIALS_TOGETHER": min(PARTIALS_TOGETHER, triton.next_power_of_2(ins.sizes["num_partials"])),
    }
    return (Launch.of(skip_gate_kernel, ins, (1,), blocks, num_warps=1, fuse_multiply_add=False),)
