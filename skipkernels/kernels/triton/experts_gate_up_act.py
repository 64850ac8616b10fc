"""experts_gate_up_act: gate_up_act of each chosen expert, for the rows that chose it."""

from __future__ import annotations

import triton
import triton.language as tl

from skipkernels.kernels.triton.activation import activated, gated, up_factor
from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.linear import linear, tile
from skipkernels.kernels.triton.rows import row_tiles
from skipkernels.program.table import Instruction


@triton.jit
def expert_at(expert_begins, pair, num_begins: tl.constexpr, BLOCK_BEGINS: tl.constexpr):
    """Whose choice the list's entry ``pair`` is; behind the list, the number of experts."""
    index = tl.arange(0, BLOCK_BEGINS)
    begins = tl.load(expert_begins + index, mask=index < num_begins, other=2147483647)
    return tl.sum((begins <= pair).to(tl.int32), axis=0) - 1


@triton.jit(do_not_specialize=["num_hidden_layers", "layer"])
def experts_gate_up_act_kernel(
    hidden_states,
    post_attention_layernorm,
    gate_up_proj,
    gate_up_bias,  # None: there is none
    expert_begins,
    expert_pairs,
    gate_thresholds,  # None: all neurons are kept, as with the next two
    row_sequence,
    neuron_scale,
    expert_intermediate,
    row_mask,
    num_hidden_layers,
    layer,
    rms_norm_eps,
    hidden_size: tl.constexpr,
    expert_size: tl.constexpr,
    experts_per_token: tl.constexpr,
    num_begins: tl.constexpr,
    activation: tl.constexpr,
    BLOCK_BEGINS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    # the programs of an expert's first choice, and of every BLOCK_ROWS-th behind it, take the next BLOCK_ROWS
    first = tl.program_id(0)
    expert = expert_at(expert_begins, first, num_begins, BLOCK_BEGINS)
    if expert >= num_begins - 1:
        return
    if (first - tl.load(expert_begins + expert)) % BLOCK_ROWS != 0:
        return
    at = first + tl.arange(0, BLOCK_ROWS)
    inside = at < tl.load(expert_begins + expert + 1)
    pairs = tl.load(expert_pairs + at, mask=inside, other=0)
    rows = pairs // experts_per_token
    wanted = inside & (tl.load(row_mask + rows, mask=inside, other=0) != 0)  # where no row is, the list is an old one
    if tl.max(wanted.to(tl.int32), axis=0) == 0:
        return
    x = hidden_states
    if BLOCK_ROWS == 1:
        x += tl.max(rows, axis=0) * hidden_size
    index = tl.arange(0, BLOCK_OUT)
    if gate_thresholds is None:
        # gate and up rows alternate, so that one tile holds both of a channel
        PAIRS: tl.constexpr = BLOCK_OUT // 2
        channels = tl.program_id(1) * PAIRS + index // 2
        features = expert * (2 * expert_size) + channels + index % 2 * expert_size
        gate_up = linear(
            x, post_attention_layernorm, rms_norm_eps, gate_up_proj, features, channels < expert_size, rows, wanted,
            hidden_size, None, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        if gate_up_bias is not None:
            gate_up += tl.load(gate_up_bias + features, mask=channels < expert_size, other=0.0)[None, :]
        gate, up = tl.split(tl.reshape(gate_up, [BLOCK_ROWS, PAIRS, 2]))
        channels = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
        tl.store(
            expert_intermediate + pairs[:, None] * expert_size + channels[None, :],
            gated(activation, gate, up),
            mask=wanted[:, None] & (channels < expert_size)[None, :],
        )
    else:
        # a tile of gate, then those rows of up whose neurons some row keeps
        channels = tl.program_id(1) * BLOCK_OUT + index
        inside = channels < expert_size
        mask = wanted[:, None] & inside[None, :]
        features = expert * (2 * expert_size) + channels
        gate = linear(
            x, post_attention_layernorm, rms_norm_eps, gate_up_proj, features, inside, rows, wanted,
            hidden_size, None, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        if gate_up_bias is not None:
            gate += tl.load(gate_up_bias + features, mask=inside, other=0.0)[None, :]
        sequences = tl.load(row_sequence + rows, mask=wanted, other=0)
        least = tl.load(gate_thresholds + sequences * num_hidden_layers + layer, mask=wanted, other=0.0)
        least *= tl.load(neuron_scale + rows, mask=wanted, other=0.0)
        value = activated(activation, gate)
        value = tl.where(tl.abs(value) < least[:, None], 0.0, value)
        kept = tl.max((mask & (value != 0)).to(tl.int32), axis=0) != 0
        features += expert_size
        up = linear(
            x, post_attention_layernorm, rms_norm_eps, gate_up_proj, features, kept, rows, wanted,
            hidden_size, None, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
        if gate_up_bias is not None:
            up += tl.load(gate_up_bias + features, mask=inside, other=0.0)[None, :]
        tl.store(
            expert_intermediate + pairs[:, None] * expert_size + channels[None, :],
            tl.where(value == 0, 0.0, value * up_factor(activation, up)),
            mask=mask,
        )


def experts_gate_up_act(ins: Instruction) -> tuple[Launch, ...]:
    sizes = ins.sizes
    _, block_rows = row_tiles(sizes["num_rows"])
    matrix = ins.tensors["gate_up_proj"][: 2 * sizes["expert_size"]]  # of one expert
    cut = tile(matrix, sizes["num_rows"], unit=2)
    features = sizes["expert_size"] * (2 if ins.tensors["gate_thresholds"] is None else 1)
    grid = (sizes["num_pairs"], triton.cdiv(features, cut.out))
    blocks = {
        "num_hidden_layers": sizes.get("num_hidden_layers", 0),  # only gate_thresholds has the symbol
        "BLOCK_BEGINS": triton.next_power_of_2(sizes["num_begins"]),
        "BLOCK_ROWS": block_rows,
        "BLOCK_OUT": cut.out,
        "BLOCK_IN": cut.columns,
    }
    return (Launch.of(experts_gate_up_act_kernel, ins, grid, blocks),)
