"""neuron_gate: neuron_scale of each decode row, 0 in its warm-up, then the factor on its thresholds for neurons.

One program decides for all sequences; every operation is one fp32 rounding, as in ``NeuronController`` of
``program.reference``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.ratio import adapted_scale, clamp, owed
from skipkernels.kernels.triton.rows import wanted_rows
from skipkernels.program.reference import NeuronController
from skipkernels.program.table import Instruction

STEER = tl.constexpr(NeuronController.STEER)


@triton.jit(do_not_specialize=["num_sequences", "max_seq_len"])
def neuron_gate_kernel(
    neuron_scale,
    num_generated,
    warmup_tokens,
    ramp_tokens,
    neuron_target_ratio,
    threshold_scale,
    skipped,
    left_out,
    scale_map,
    row_mask,
    num_sequences,
    max_seq_len,
    num_hidden_layers: tl.constexpr,
    ffn_bytes: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
):
    sequences, wanted, any_wanted = wanted_rows(row_mask, num_sequences, BLOCK_SEQUENCES)
    if not any_wanted:
        return
    tokens = tl.load(num_generated + sequences, mask=wanted, other=0)
    warmup = tl.load(warmup_tokens + sequences, mask=wanted, other=0)
    warm = wanted & (tokens >= warmup)
    scale = tl.load(threshold_scale + sequences, mask=warm, other=0.0)
    target = tl.load(neuron_target_ratio + sequences, mask=warm, other=0.0)
    holds = target > 0

    per_token = tl.full([BLOCK_SEQUENCES], ffn_bytes * num_hidden_layers, tl.float32)
    so_far = tl.load(skipped + sequences, mask=holds, other=0).to(tl.int64) * ffn_bytes
    so_far += tl.load(left_out + sequences, mask=holds, other=0)
    ramp = tl.load(ramp_tokens + sequences, mask=holds, other=0)
    behind = owed(tokens, target * per_token, warmup, ramp) - so_far.to(tl.float32)
    behind = clamp(tl.div_rn(behind, per_token), -1.0, 1.0)
    adapted = adapted_scale(scale, behind)
    steer = behind * STEER
    held = tl.where(steer >= 0, adapted * (1.0 + steer), tl.div_rn(adapted, 1.0 - tl.minimum(steer, 0.0)))

    tl.debug_barrier()  # threads of several warps may hold the same element: all have read it before one writes it
    tl.store(threshold_scale + sequences, adapted, mask=holds)
    factor = tl.where(holds, held, scale)  # 0 in the warm-up
    tl.store(neuron_scale + sequences, factor, mask=wanted)
    tl.store(scale_map + sequences.to(tl.int64) * max_seq_len + tokens, factor, mask=wanted)


def neuron_gate(ins: Instruction) -> tuple[Launch, ...]:
    blocks = {"BLOCK_SEQUENCES": triton.next_power_of_2(ins.sizes["num_sequences"])}
    return (Launch.of(neuron_gate_kernel, ins, (1,), blocks, fuse_multiply_add=False),)
