"""The kernels that leave neurons out: lists of any length, bits that depend on no neighbour, weights not to be read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skipkernels.program import Program
from skipkernels.program.state import DecodeState
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, Policy
from tests.cuda.comparison import case, compare_op
from tests.cuda.kernels import HostKernels
from tests.executors.programs import Case, same_bits

NEURON_OPS = ("neuron_gate", "gate_proj_act", "select_neurons", "up_proj_mul", "down_proj_neurons_add")
KEEPS_ALL = NeuronPolicy(gate_thresholds=(0.0,), warmup_tokens=0)
SOME = NeuronPolicy(gate_thresholds=(0.2,), product_thresholds=(0.1,), warmup_tokens=0)
HELD = NeuronPolicy(gate_thresholds=(0.2,), product_thresholds=(0.3,), warmup_tokens=1, target_ratio=0.3)
NONE = NeuronPolicy(gate_thresholds=(1e9,), warmup_tokens=0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def neuron_case(sequences: int, *policies: Policy, **changes: object) -> Case:
    return case(seq_lens=tuple(range(5, 5 + sequences)), policies=policies, neuron_rows=True, **changes)


@dtypes
@pytest.mark.parametrize("sequences", [1, 3, 6])  # one row, a group of rows that share a read, more than one
@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "num_sms"),
    [
        (8, 5, 2),  # one lane works; most warps have no neuron
        (520, 1100, 1),  # several turns of a warp over x, over the list and over segments of neurons
        (264, 67, 40),  # more blocks than pairs of neurons; a last block of columns that is not full
        (37, 70, 3),  # odd: no 16-byte loads
    ],
)
def test_sizes(hidden_size: int, intermediate_size: int, num_sms: int, sequences: int, dtype: torch.dtype) -> None:
    program = neuron_case(
        sequences, SOME, HELD, NONE, hidden_size=hidden_size, intermediate_size=intermediate_size, dtype=dtype
    )
    for op in NEURON_OPS:
        compare_op(op, program, num_sms=num_sms, seed=sequences % 6, races=hidden_size < 100)


@pytest.mark.parametrize("policy", [KEEPS_ALL, NONE], ids=["all", "none"])
@pytest.mark.parametrize("sequences", [1, 4])
def test_lists_of_all_and_of_nothing(sequences: int, policy: Policy) -> None:
    for op in NEURON_OPS:
        compare_op(op, neuron_case(sequences, policy, intermediate_size=100))


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_list_that_takes_several_turns(sequences: int) -> None:
    """More than 8192 neurons: the list goes on where the turn before it ended."""
    program = neuron_case(sequences, SOME, HELD, intermediate_size=9000, hidden_size=8, vocab_size=4)
    compare_op("select_neurons", program, seed=4, races=True)


def test_more_rows_than_run_side_by_side() -> None:
    """21 rows, some of which are idle: groups of rows take all chunks, prompts beside decode rows."""
    program = neuron_case(
        5, SOME, DensePolicy(), prompt_rows=(5, 3, 0, 2, 4), active=(True, False, True, True, True), hidden_size=272
    )
    for op in NEURON_OPS:
        compare_op(op, program, seed=3, races=True)


@pytest.mark.parametrize("active", [(False, True, False), (False,) * 3])
def test_rows_that_are_not_wanted(active: tuple[bool, ...]) -> None:
    for op in NEURON_OPS:
        compare_op(op, neuron_case(3, SOME, active=active), races=True)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@dtypes
def test_thresholds_of_zero_give_the_bits_of_the_dense_program(dtype: torch.dtype, activation: str) -> None:
    """Of one row, where gate_up_act and up_proj_mul add in the same order; several are multiplied on tensor cores."""
    hidden = []
    for policy in (KEEPS_ALL, DensePolicy()):
        program_case = neuron_case(
            1, policy, dtype=dtype, activation=activation, hidden_size=2120, intermediate_size=70, vocab_size=4
        )
        state, program = ran(program_case, "down_proj_neurons_add")
        assert ("up_proj_mul" in {ins.op for ins in program}) == (policy is KEEPS_ALL)
        hidden.append(state.hidden_states[0])
    assert not hidden[0].isnan().any()
    assert same_bits(*hidden)


def test_a_gate_that_is_its_threshold_is_kept() -> None:
    gated, program = ran(neuron_case(1, SOME), "gate_proj_act")
    gated.gate_thresholds[0, 0], gated.neuron_scale[0] = gated.intermediate[0].abs(), 1.0
    HostKernels(program, gated).run_instruction([ins.op for ins in program].index("select_neurons"))
    assert int(gated.num_neurons) == gated.intermediate.shape[1]


def ran(case: Case, last: str, **options: int) -> tuple[DecodeState, Program]:
    """The state after the case's program up to the op ``last``."""
    weights, state = case.weights(), case.state()
    program = case.program(weights, state)
    kernels = HostKernels(program, state, **options)
    for index in range(1 + [ins.op for ins in program].index(last)):
        kernels.run_instruction(index)
    return state, program


@pytest.mark.parametrize("hidden_size", [64, 37])
@pytest.mark.parametrize("prompt_rows", [0, 20])  # beside one another, and in turn
def test_rows_get_the_bits_they_get_alone(prompt_rows: int, hidden_size: int) -> None:
    """From the same gates: what neighbours keep, the number of multiprocessors and the schedule change nothing."""
    program_case = replace(
        neuron_case(5, SOME, HELD, DensePolicy(), hidden_size=hidden_size, intermediate_size=150),
        seq_lens=(5, 6, 7, 8, 30),
        prompt_rows=(0, 0, 0, 0, prompt_rows),
    )
    gated, _ = ran(program_case, "gate_proj_act")
    together = behind_gates(program_case, gated, None)
    for row in range(5):
        alone = behind_gates(program_case, gated, row, num_sms=1 + row, seed=row)
        for name in ("hidden_states", "intermediate"):
            assert same_bits(getattr(alone, name)[row], getattr(together, name)[row]), (name, row)
    assert len({int(kept) for kept in together.kept_map[:, :, 0, 1].amax(1)}) > 1


def behind_gates(case: Case, gated: DecodeState, row: int | None, **options: int) -> DecodeState:
    """The rest of the first FFN, of all rows or of one, from the residual stream and the gates of ``gated``."""
    weights, state = case.weights(), case.state()
    for name, buffer in state.buffers():
        buffer.copy_(getattr(gated, name))
    if row is not None:
        flags = state.run_ffn.clone()
        state.run_ffn.zero_()
        state.run_ffn[:, row] = flags[:, row]
    program = case.program(weights, state)
    kernels, ops = HostKernels(program, state, **options), [ins.op for ins in program]
    for index in range(ops.index("select_neurons"), ops.index("down_proj_neurons_add") + 1):
        kernels.run_instruction(index)
    return state


@pytest.mark.parametrize("sequences", [1, 3])
def test_weights_of_neurons_left_out_are_not_read(sequences: int) -> None:
    """Rows of the union are read; a row that does not keep a neighbour's neuron takes nothing from it, NaN or not."""
    program_case = neuron_case(sequences, SOME, NONE, intermediate_size=150)
    clean, _ = ran(program_case, "down_proj_neurons_add")
    gated, _ = ran(program_case, "select_neurons")
    weights, state = program_case.weights(), program_case.state()
    kept_up = gated.intermediate[:sequences] != 0
    kept_down = clean.intermediate[:sequences] != 0
    assert 0 < kept_down.sum() < kept_up.sum() < kept_up.numel()
    up_proj, down_proj = weights.layers[0].gate_up_proj[150:], weights.layers[0].down_proj.T
    up_proj[~kept_up.any(0)], down_proj[~kept_down.any(0)] = torch.nan, torch.nan
    if sequences > 1:  # the second row keeps nothing
        assert not kept_up[1].any()
        down_proj[kept_down[0]] = torch.nan
    program = program_case.program(weights, state)
    kernels = HostKernels(program, state)
    for index in range(1 + [ins.op for ins in program].index("down_proj_neurons_add")):
        kernels.run_instruction(index)
    row = sequences // 2  # the only one, or that which keeps nothing
    assert same_bits(state.hidden_states[row], clean.hidden_states[row])
    assert bool(state.hidden_states[0].isnan().any()) == (sequences > 1)


@pytest.mark.parametrize("hidden_size", [64, 37])
@pytest.mark.parametrize("sequences", [1, 3])
def test_weights_of_experts_neurons_left_out_are_not_read(sequences: int, hidden_size: int) -> None:
    """Nor those of experts that nobody chose."""
    seed = {1: 1, 3: 4}[sequences]  # of these all sequences are past their warm-up
    program_case = neuron_case(
        sequences, SOME, hidden_size=hidden_size, intermediate_size=150, num_experts=5, dtype=torch.float32, seed=seed
    )
    clean, _ = ran(program_case, "experts_down_proj_neurons_add")
    gated, _ = ran(program_case, "experts_gate_up_act")
    weights, state = program_case.weights(), program_case.state()
    size = weights.layers[0].gate_up_proj.shape[0] // 10
    kept_up, kept_down = (kept_by_expert(each, sequences, size) for each in (gated, clean))
    assert 0 < kept_down.sum() < kept_up.sum() < kept_up.numel()
    up_proj = weights.layers[0].gate_up_proj.view(5, 2, size, -1)[:, 1]
    up_proj[~kept_up], weights.layers[0].down_proj.T[~kept_down.flatten()] = torch.nan, torch.nan
    program = program_case.program(weights, state)
    kernels = HostKernels(program, state)
    for index in range(1 + [ins.op for ins in program].index("experts_down_proj_neurons_add")):
        kernels.run_instruction(index)
    assert same_bits(state.hidden_states[:sequences], clean.hidden_states[:sequences])
    assert not clean.hidden_states[:sequences].isnan().any()


def kept_by_expert(state: DecodeState, rows: int, size: int) -> torch.Tensor:
    """Neurons that some of the rows keep, bool [experts, size]."""
    kept = torch.zeros(5, size, dtype=torch.bool)
    for row in range(rows):
        for choice, expert in enumerate(state.expert_ids[row].tolist()):
            kept[expert] |= state.expert_intermediate[row, choice] != 0
    return kept


def test_a_chunk_that_warps_cannot_list_is_refused() -> None:
    program_case = neuron_case(1, SOME)
    state = program_case.state()
    program = program_case.program(program_case.weights(), state)
    (ins,) = (ins for ins in program if ins.op == "down_proj_neurons_add")
    wrong = replace(ins, scalars={**ins.scalars, "neuron_chunk": 4097})
    with pytest.raises(ValueError, match=r"neuron_chunk must lie in 1\.\.4096 on CUDA, got 4097"):
        HostKernels((wrong,), state)
