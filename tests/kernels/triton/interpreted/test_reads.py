"""What the kernels read: every weight once for a tile of rows, nothing of a skipped FFN, nothing of other rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from skipkernels.kernels.triton import TRITON
from skipkernels.program.reference import REFERENCE
from skipkernels.program.state import DecodeState
from skipkernels.program.table import Instruction
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, SkipPolicy
from tests.kernels.triton.interpreted.test_programs import plain_case

MATRICES = {
    "qkv_rope_append": "qkv_proj",
    "o_proj_add": "o_proj",
    "gate_up_act": "gate_up_proj",
    "down_proj_add": "down_proj",
    "gate_proj_act": "gate_proj",
    "up_proj_mul": "up_proj",
    "down_proj_neurons_add": "down_proj",
    "lm_head": "lm_head",
}


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The addresses of the elements that kernels load, as the interpreter passes them to memory."""
    load, seen = interpreter._interpreter.load, []

    def recording(pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        seen.append(pointers[mask].ravel())
        return load(pointers, mask, other, dtype)

    monkeypatch.setattr(interpreter._interpreter, "load", recording)
    return seen


def reads_of(tensor: torch.Tensor, addresses: list[np.ndarray]) -> np.ndarray:
    """How often each element of a contiguous tensor was read."""
    offsets = np.concatenate(addresses).astype(np.int64) - tensor.data_ptr()
    offsets = offsets[(offsets >= 0) & (offsets < tensor.nbytes)]
    return np.bincount(offsets // tensor.element_size(), minlength=tensor.numel())


NEURONS = NeuronPolicy(gate_thresholds=(0.0,), warmup_tokens=0)


def program(num_sequences: int, **changes: object) -> tuple[dict[str, Instruction], DecodeState]:
    """Every op of a program without and of one with neurons to leave out, all of which are listed and kept. Where there
    are experts, rows have chosen theirs."""
    case = plain_case(num_sequences, torch.bfloat16, hidden_size=53, intermediate_size=21, **changes)
    gates = (0.0,) * case.num_layers
    neurons = replace(case, neuron_rows=True, policies=(replace(NEURONS, gate_thresholds=gates),))
    state = neurons.state()
    for slot in range(case.num_sequences):
        state.set_policy(slot, case.policies[slot % len(case.policies)].plan(case.num_layers))
    state.intermediate.fill_(1.0)
    state.expert_intermediate.fill_(1.0)
    state.neurons.copy_(torch.arange(len(state.neurons)))
    state.num_neurons.fill_(21)
    state.neuron_scale.fill_(1.0)
    programs = [each.program(each.weights(), state) for each in (neurons, case)]
    instructions = {ins.op: ins for each in programs for ins in each}
    if case.num_experts:
        REFERENCE["route_experts"](instructions["route_experts"])
    return instructions, state


@pytest.mark.parametrize("op", MATRICES)
@pytest.mark.parametrize(("rows", "tiles"), [(1, 1), (3, 1), (16, 1), (20, 2)])
def test_every_weight_is_read_once_for_a_tile_of_rows(
    op: str, rows: int, tiles: int, addresses: list[np.ndarray]
) -> None:
    instructions, _ = program(rows, idle_rows=0)
    TRITON[op](instructions[op])
    assert (reads_of(instructions[op].tensors[MATRICES[op]], addresses) == tiles).all()


@pytest.mark.parametrize("op", MATRICES)
def test_a_tile_without_active_rows_reads_no_weight(op: str, addresses: list[np.ndarray]) -> None:
    instructions, _ = program(20, idle_rows=0)
    instructions[op].row_mask[:16] = 0
    TRITON[op](instructions[op])
    assert (reads_of(instructions[op].tensors[MATRICES[op]], addresses) == 1).all()


@pytest.mark.parametrize("op", MATRICES)
@pytest.mark.parametrize("rows", [1, 3])
def test_where_no_row_is_wanted_nothing_is_read_but_the_flags(op: str, rows: int, addresses: list[np.ndarray]) -> None:
    instructions, _ = program(rows, idle_rows=0)
    instructions[op].row_mask.zero_()
    TRITON[op](instructions[op])
    flags = reads_of(instructions[op].row_mask, addresses)
    assert flags.all()
    assert flags.sum() == sum(len(read) for read in addresses)


@pytest.mark.parametrize("op", TRITON)
def test_nothing_of_other_rows_is_read(op: str, addresses: list[np.ndarray]) -> None:
    """The second of three sequences is idle, and so is the last of five prompt rows: no other axis is as long."""
    policy = SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=0, target_ratio=0.1)
    rows = {"active": (True, False, True), "prompt_rows": (2, 0, 2), "seq_lens": (4, 7, 9)}
    instructions, state = program(
        3,
        **rows,
        num_layers=4,
        policies=(policy,),
        branch_norms=op == "branch_add",
        post_norms_only=op == "norm_rope_append",
        num_experts=2 if "experts" in op else 0,
    )
    TRITON[op](instructions[op])
    idle = {state.num_rows: (1, -1), state.num_sequences: (1,), state.num_prompt_rows: (-1,)}
    for name, buffer in state.buffers():
        if name in ("active", "run_ffn", "expert_begins"):  # the flags, and what is of all rows together
            continue
        reads = reads_of(buffer, addresses).reshape(buffer.shape)
        for axis in (0, 1)[: buffer.dim()]:
            for row in idle.get(buffer.shape[axis], ()):
                assert not np.take(reads, row, axis).any(), f"{name}, row {row} of axis {axis}"
    blocks = state.block_table[1][state.block_table[1] >= 0].tolist()
    assert blocks
    for cache in (state.k_cache, state.v_cache):
        assert not reads_of(cache, addresses).reshape(cache.shape)[:, blocks].any()


def test_a_dense_sequence_beside_a_gated_one_is_not_measured(addresses: list[np.ndarray]) -> None:
    policy = SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=0)
    instructions, state = program(2, num_layers=4, policies=(policy, DensePolicy()))
    state.gated.fill_(1)  # in front of the last layer too
    TRITON["skip_gate"](instructions["skip_gate"])
    reads = reads_of(state.similarity_partials, addresses).reshape(state.similarity_partials.shape)
    assert reads[:, 0].all()
    assert not reads[:, 1].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_rows_of_neurons_left_out_are_not_read(rows: int, addresses: list[np.ndarray]) -> None:
    instructions, state = program(rows, idle_rows=0)
    kept = torch.zeros(21, dtype=torch.bool)
    kept[[2, 3, 11, 20]] = True
    state.intermediate[:, ~kept] = 0.0
    state.intermediate[0, 11] = 0.0
    kept[11] = rows > 1
    listed = kept.nonzero()[:, 0]
    state.neurons[: len(listed)] = listed
    state.num_neurons.fill_(len(listed))
    for op in ("up_proj_mul", "down_proj_neurons_add"):
        addresses.clear()
        TRITON[op](instructions[op])
        matrix = instructions[op].tensors[MATRICES[op]]
        assert (reads_of(matrix, addresses).reshape(matrix.shape) == kept.numpy()[:, None]).all()


def test_of_experts_only_kept_neurons_are_read(addresses: list[np.ndarray]) -> None:
    """Gates of chosen experts, no ups where thresholds leave out all, and of down_proj the rows that are not 0."""
    case = plain_case(2, torch.bfloat16, hidden_size=53, intermediate_size=42, num_experts=3, neuron_rows=True)
    policy = NeuronPolicy(gate_thresholds=(1e9,), warmup_tokens=0)
    case = replace(case, policies=(policy,), idle_rows=0)
    state = case.state()
    state.neuron_scale.fill_(1.0)
    state.hidden_states.copy_(torch.randn(state.hidden_states.shape, generator=torch.Generator().manual_seed(0)))
    instructions = {ins.op: ins for ins in case.program(case.weights(), state)}
    REFERENCE["route_experts"](instructions["route_experts"])
    state.expert_begins.copy_(torch.tensor([0, 2, 4, 4]))  # nobody has chosen the last expert, which none would miss
    state.expert_pairs[:4] = torch.tensor([0, 3, 1, 4])
    first = instructions["experts_gate_up_act"]
    TRITON[first.op](first)
    reads = reads_of(first.tensors["gate_up_proj"], addresses).reshape(3, 2, 21, 53)
    assert (reads[:2, 0] > 0).all()
    assert not reads[2].any()
    assert not reads[:, 1].any()
    assert not state.expert_intermediate[:, :2].any()
    addresses.clear()
    state.expert_intermediate[:, :2, ::3] = 1.0
    second = instructions["experts_down_proj_neurons_add"]
    TRITON[second.op](second)
    reads = reads_of(second.tensors["down_proj"], addresses).reshape(3, 21, 53)
    assert (reads[:2, ::3] > 0).all()
    assert not reads[2].any()
    assert not np.delete(reads, slice(0, None, 3), axis=1).any()
