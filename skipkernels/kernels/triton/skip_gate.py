"""skip_gate: similarity, a fixed set or a random draw -> run_ffn of a layer, by each sequence's own policy.

One program decides for all sequences. Every operation is one fp32 rounding, as in ``RatioController`` of
``program.reference``: divisions and roots are correctly rounded ones, and nothing is contracted into a multiply-add.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.philox import GATE_STREAM, philox_uniform
from skipkernels.kernels.triton.ratio import adapted_scale, clamp, owed
from skipkernels.kernels.triton.rows import wanted_rows
from skipkernels.program.table import Instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES

DENSE = tl.constexpr(0)
SIMILARITY = tl.constexpr(1 + GATE_MODES.index("similarity"))
RANDOM = tl.constexpr(1 + GATE_MODES.index("random"))
PER_ROW = tl.constexpr(BATCH_RULES.index("per_row"))
ALL = tl.constexpr(BATCH_RULES.index("all"))
MAJORITY = tl.constexpr(BATCH_RULES.index("majority"))

SEQUENCES_PER_WARP = 16
MOST_WARPS = 8
PARTIALS_TOGETHER = 64
SUMS_PER_THREAD = 128
"""Partial sums on their way from memory at once: they are added one after the other, but need not come so."""


@triton.jit
def cosine(
    similarity_partials,
    sequences,
    wanted,
    num_sequences,
    num_partials: tl.constexpr,
    PARTIALS_TOGETHER: tl.constexpr,
):
    """<h, h'> / (|h| |h'|) [BLOCK_SEQUENCES] from its partial sums, added in their order; 0 for a zero vector."""
    which = tl.arange(0, 4)[None, :]
    mask = wanted[:, None] & (which < 3)
    sums = tl.zeros(mask.shape, tl.float32)
    for start in range(0, num_partials, PARTIALS_TOGETHER):
        for offset in tl.static_range(PARTIALS_TOGETHER):
            partial = start + offset + tl.zeros_like(sequences)[:, None]
            at = similarity_partials + (partial * num_sequences + sequences[:, None]) * 3 + which
            sums += tl.load(at, mask=mask & (partial < num_partials), other=0.0)
    dot = tl.sum(tl.where(which == 0, sums, 0.0), axis=1)
    before = tl.sum(tl.where(which == 1, sums, 0.0), axis=1)
    after = tl.sum(tl.where(which == 2, sums, 0.0), axis=1)
    norm = tl.sqrt_rn(before) * tl.sqrt_rn(after)
    return tl.where(norm > 0, tl.div_rn(dot, tl.where(norm > 0, norm, 1.0)), 0.0)


@triton.jit
def decide_together(triggers, warm, members, MAJORITY_DECIDES: tl.constexpr):
    """``triggers`` with what ``members`` (the sequences of one batch rule) agree upon in place of their own wishes."""
    voters = tl.sum(members.to(tl.int32), axis=0)
    wanting = tl.sum((members & triggers).to(tl.int32), axis=0)
    vetoes = tl.sum((members & ~warm).to(tl.int32), axis=0)
    needed = voters // 2 + 1 if MAJORITY_DECIDES else voters
    return tl.where(members, (vetoes == 0) & (wanting >= needed), triggers)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "layer"])
def skip_gate_kernel(
    run_ffn,
    skip_remaining,
    similarity,
    similarity_partials,
    num_generated,
    skipped,
    threshold_scale,
    gate_mode,
    gated,
    first_gated,
    gate_threshold,
    gate_span,
    warmup_tokens,
    batch_rule,
    gate_probability,
    gate_seed,
    target_ratio,
    ramp_tokens,
    row_mask,
    num_rows,
    num_sequences,
    layer,
    num_hidden_layers: tl.constexpr,
    num_partials: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
    PARTIALS_TOGETHER: tl.constexpr,
):
    sequences, wanted, _ = wanted_rows(row_mask, num_sequences, BLOCK_SEQUENCES)
    mode = tl.load(gate_mode + sequences, mask=wanted, other=DENSE)
    wanted &= mode != DENSE
    wanted &= tl.load(gated + layer * num_sequences + sequences, mask=wanted, other=0) != 0
    if tl.max(wanted.to(tl.int32), axis=0) == 0:
        return
    tokens = tl.load(num_generated + sequences, mask=wanted, other=0)
    warmup = tl.load(warmup_tokens + sequences, mask=wanted, other=0)
    warm = tokens >= warmup

    drawn = wanted & warm & (mode == RANDOM)
    skipping = wanted & warm & (mode != SIMILARITY)
    if tl.max(drawn.to(tl.int32), axis=0) != 0:
        seed = tl.load(gate_seed + sequences, mask=drawn, other=0)
        probability = tl.load(gate_probability + sequences, mask=drawn, other=0.0)
        draws = philox_uniform(seed, tl.zeros_like(sequences) + layer // 4, tokens, GATE_STREAM)
        draw = tl.sum(tl.where(tl.arange(0, 4)[None, :] == layer % 4, draws, 0.0), axis=1)
        skipping &= (mode != RANDOM) | (draw < probability.to(tl.float64))

    similar = wanted & (mode == SIMILARITY)
    if tl.max(similar.to(tl.int32), axis=0) != 0:
        tested = (layer - 1) * num_sequences + sequences
        ran = tl.load(run_ffn + (layer - 1) * num_rows + sequences, mask=similar, other=0) != 0
        found = cosine(similarity_partials, sequences, ran, num_sequences, num_partials, PARTIALS_TOGETHER)
        threshold = tl.load(gate_threshold + tested, mask=ran, other=0.0)
        triggers = found >= threshold
        span = tl.load(gate_span + sequences, mask=similar, other=0)
        so_far = tl.load(skipped + sequences, mask=similar, other=0)

        # where a ratio is held
        target = tl.load(target_ratio + sequences, mask=similar, other=0.0)
        holds = target > 0
        ramp = tl.load(ramp_tokens + sequences, mask=holds, other=0)
        scale = tl.load(threshold_scale + sequences, mask=holds, other=1.0)
        layers = tl.full([BLOCK_SEQUENCES], num_hidden_layers, tl.float32)
        slack = layers * 0.5
        owed_before = owed(tokens, target * layers, warmup, ramp) - so_far.to(tl.float32)
        owed_now = owed(tokens + 1, target * layers, warmup, ramp) - so_far.to(tl.float32)
        behind = clamp(tl.div_rn(owed_before, layers), -1.0, 1.0)
        adapts = holds & warm & (layer == tl.load(first_gated + sequences, mask=holds, other=0))
        scale = tl.where(adapts, adapted_scale(scale, behind), scale)
        behind = tl.div_rn(owed_now, slack)
        allowed = tl.maximum(tl.floor(owed_now + slack), 0.0).to(tl.int32)
        limit = tl.where(holds, 1.0 - threshold, 0.0) * scale
        limit = tl.where(behind >= 0, limit * (1.0 + behind), tl.div_rn(limit, 1.0 - tl.minimum(behind, 0.0)))
        triggers = tl.where(holds, (allowed > 0) & ((behind >= 1.0) | (1.0 - found <= limit)), triggers)
        span = tl.where(holds, tl.minimum(span, allowed), span)

        triggers &= warm & ran
        rule = tl.load(batch_rule + sequences, mask=similar, other=PER_ROW)
        triggers = decide_together(triggers, warm, similar & (rule == ALL), False)
        triggers = decide_together(triggers, warm, similar & (rule == MAJORITY), True)
        remaining = tl.where(triggers, span, tl.load(skip_remaining + sequences, mask=similar, other=0))
        counting = similar & (remaining > 0)
        tl.debug_barrier()  # threads of several warps may hold the same element: all have read it before one writes it
        tl.store(similarity + tested, found, mask=ran)
        tl.store(threshold_scale + sequences, scale, mask=adapts)
        tl.store(skip_remaining + sequences, remaining - counting.to(tl.int32), mask=similar)
        tl.store(skipped + sequences, so_far + 1, mask=counting)
        skipping |= counting
    tl.store(run_ffn + layer * num_rows + sequences, tl.zeros_like(sequences), mask=skipping)


def skip_gate(ins: Instruction) -> tuple[Launch, ...]:
    block = triton.next_power_of_2(ins.sizes["num_sequences"])
    warps = min(MOST_WARPS, max(1, block // SEQUENCES_PER_WARP))
    sums = triton.cdiv(4 * block, 32 * warps)  # of one partial, in each thread
    together = min(PARTIALS_TOGETHER, max(1, SUMS_PER_THREAD // sums))
    blocks = {
        "BLOCK_SEQUENCES": block,
        "PARTIALS_TOGETHER": min(together, triton.next_power_of_2(ins.sizes["num_partials"])),
    }
    return (Launch.of(skip_gate_kernel, ins, (1,), blocks, num_warps=warps, fuse_multiply_add=False),)
