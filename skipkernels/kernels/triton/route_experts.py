"""route_experts: router_logits, then each row's experts and their shares, and the list of choices by expert."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, tile
from skipkernels.kernels.triton.rows import row_tiles, wanted_rows
from skipkernels.program.table import Instruction

ROWS_TOGETHER = 16
"""Rows whose choices are made at a time: 16 rows of 128 logits are 8 KB."""


@triton.jit(do_not_specialize=["num_rows"])
def router_kernel(
    hidden_states,
    post_attention_layernorm,
    router,
    router_bias,  # None: there is none
    router_logits,
    row_mask,
    num_rows,
    rms_norm_eps,
    hidden_size: tl.constexpr,
    num_experts: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    rows, wanted, any_wanted = wanted_rows(row_mask, num_rows, BLOCK_ROWS)
    if not any_wanted:
        return
    experts = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = experts < num_experts
    logits = linear(
        hidden_states, post_attention_layernorm, rms_norm_eps, router, experts, inside, rows, wanted,
        hidden_size, None, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    if router_bias is not None:
        logits += tl.load(router_bias + experts, mask=inside, other=0.0)[None, :]
    at = router_logits + rows[:, None] * num_experts + experts[None, :]
    tl.store(at, logits, mask=wanted[:, None] & inside[None, :])


@triton.jit
def choose(
    router_logits,
    expert_ids,
    expert_weights,
    rows,
    wanted,
    num_experts: tl.constexpr,
    experts_per_token: tl.constexpr,
    norm_topk_prob: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """The choices of rows [ROWS]; how many of them fell on each expert [BLOCK_EXPERTS]."""
    experts = tl.arange(0, BLOCK_EXPERTS)
    inside = experts < num_experts
    mask = wanted[:, None] & inside[None, :]
    at = router_logits + rows[:, None] * num_experts + experts[None, :]
    left = tl.load(at, mask=mask, other=float("-inf"))
    left = tl.where(inside[None, :], left, float("-inf"))
    most = tl.max(left, axis=1)
    shares = tl.where(mask, tl.exp(left - most[:, None]), 0.0)
    total = tl.sum(shares, axis=1)
    counts = tl.zeros([BLOCK_EXPERTS], tl.int32)
    chosen = tl.zeros_like(total)
    for choice in tl.static_range(experts_per_token):
        # the lower id of equals; where there is no number, the last
        top = tl.max(left, axis=1)
        candidates = tl.where((left == top[:, None]) & inside[None, :], experts[None, :], num_experts - 1)
        expert = tl.min(candidates, axis=1)
        own = experts[None, :] == expert[:, None]
        share = tl.sum(tl.where(own, shares, 0.0), axis=1) / total
        chosen += share
        tl.store(expert_ids + rows * experts_per_token + choice, expert, mask=wanted)
        tl.store(expert_weights + rows * experts_per_token + choice, share, mask=wanted)
        counts += tl.sum((own & wanted[:, None]).to(tl.int32), axis=0)
        left = tl.where(own, float("-inf"), left)
    if norm_topk_prob:
        tl.debug_barrier()
        for choice in tl.static_range(experts_per_token):
            of_choice = expert_weights + rows * experts_per_token + choice
            tl.store(of_choice, tl.load(of_choice, mask=wanted) / chosen, mask=wanted)
    return counts


@triton.jit(do_not_specialize=["num_rows", "layer"])
def choose_experts_kernel(
    router_logits,
    expert_ids,
    expert_weights,
    expert_begins,
    expert_pairs,
    experts_read,
    row_mask,
    num_rows,
    layer,
    num_experts: tl.constexpr,
    experts_per_token: tl.constexpr,
    norm_topk_prob: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: the list of a step is short, and everybody behind it waits for the whole of it."""
    experts = tl.arange(0, BLOCK_EXPERTS)
    counts = tl.zeros([BLOCK_EXPERTS], tl.int32)
    any_wanted = 0
    first = 0
    while first < num_rows:
        rows = first + tl.arange(0, ROWS)
        wanted = tl.load(row_mask + rows, mask=rows < num_rows, other=0) != 0
        any_wanted += tl.sum(wanted.to(tl.int32), axis=0)
        counts += choose(
            router_logits, expert_ids, expert_weights, rows, wanted,
            num_experts, experts_per_token, norm_topk_prob, BLOCK_EXPERTS,
        )  # fmt: skip
        first += ROWS
    if any_wanted == 0:
        return
    filled = tl.cumsum(counts, axis=0) - counts
    tl.store(expert_begins + experts, filled, mask=experts < num_experts)
    tl.store(expert_begins + num_experts, tl.sum(counts, axis=0))
    read = tl.sum((counts > 0).to(tl.int64), axis=0)
    tl.store(experts_read + layer, tl.load(experts_read + layer) + read)
    tl.debug_barrier()  # other threads have stored the choices
    choice = tl.arange(0, BLOCK_CHOICES)
    row = 0
    while row < num_rows:
        inside = choice < experts_per_token
        wanted = inside & (tl.load(row_mask + row + choice * 0, mask=inside, other=0) != 0)
        pair = row * experts_per_token + choice
        expert = tl.load(expert_ids + pair, mask=wanted, other=0)
        own = (experts[None, :] == expert[:, None]) & wanted[:, None]
        tl.store(expert_pairs + tl.sum(tl.where(own, filled[None, :], 0), axis=1), pair, mask=wanted)
        filled += tl.sum(own.to(tl.int32), axis=0)
        row += 1


def route_experts(ins: Instruction) -> tuple[Launch, ...]:
    sizes = ins.sizes
    tiles, block_rows = row_tiles(sizes["num_rows"])
    cut = tile(ins.tensors["router"], sizes["num_rows"])
    grid = (tiles, triton.cdiv(sizes["num_experts"], cut.out))
    choices = {
        "BLOCK_EXPERTS": triton.next_power_of_2(sizes["num_experts"]),
        "BLOCK_CHOICES": triton.next_power_of_2(sizes["experts_per_token"]),
        "ROWS": min(ROWS_TOGETHER, triton.next_power_of_2(sizes["num_rows"])),
    }
    return (
        Launch.of(router_kernel, ins, grid, {"BLOCK_ROWS": block_rows, "BLOCK_OUT": cut.out, "BLOCK_IN": cut.columns}),
        Launch.of(choose_experts_kernel, ins, (1,), choices),
    )
