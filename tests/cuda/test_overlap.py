"""Kernels that start before the one in front of them has ended: whole steps under many schedules, watched for races."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from skipkernels.program.state import LAYOUTS, DecodeState
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, NeuronPolicy, Policy, SkipPolicy, TimingPolicy
from tests.cuda.kernels import HostKernels
from tests.cuda_host.controls import SEEDS
from tests.executors.programs import Case, same_bits

SWITCHES = ["gate_beside_qkv", "late_prefetch", "evict_first", "early_trigger", "touch_settled", "prefetch_first_layer"]
SKIPS_ALL = SkipPolicy(threshold=-1.0, span=2, cold_start=0, cold_end=0, warmup_tokens=0)  # whatever it tests
POLICIES: list[Policy] = [
    DensePolicy(),
    SKIPS_ALL,
    SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=0, target_ratio=0.3),
    FixedPolicy((1, 2), warmup_tokens=0),
    TimingPolicy(0.5),
    NeuronPolicy(gate_thresholds=(0.1, 0.0, 0.3, 9.0), product_thresholds=(0.1,) * 4, warmup_tokens=0),
    SkipPolicy(-1.0, span=2, cold_start=0, cold_end=0, gate_thresholds=(0.1,) * 4, warmup_tokens=0),
]


def step_case(policy: Policy, sequences: int, dtype: torch.dtype, qk_norm: bool = False) -> Case:
    return Case(
        seq_lens=tuple(70 + 5 * row for row in range(sequences)),
        active=tuple(row != 1 for row in range(sequences)),
        hidden_size=96,
        intermediate_size=80,
        vocab_size=60,
        head_dim=16,
        num_key_value_heads=2,
        group_size=2,
        qk_norm=qk_norm,
        qkv_bias=qk_norm,
        dtype=dtype,
        policies=(policy,),
        seed=sequences,
        num_layers=4,
        neuron_rows=policy.plan(4) is not None and policy.plan(4).neurons is not None,
        layout=LAYOUTS["cuda"],
    )


def one_by_one(case: Case, **options: Any) -> DecodeState:
    """What the kernels leave that are launched one after the other, with nothing beside or before its time."""
    weights, state = case.weights(), case.state()
    program = case.program(weights, state)
    kernels = HostKernels(program, state, **{**options, "seed": 0})
    for index in range(len(program)):
        kernels.run_instruction(index)
    return state


def overlapped(case: Case, **options: Any) -> tuple[DecodeState, HostKernels]:
    weights, state = case.weights(), case.state()
    kernels = HostKernels(case.program(weights, state), state, **options)
    kernels.run_overlapped()
    return state, kernels


def compare_step(case: Case, **options: Any) -> None:
    expected, (actual, _) = one_by_one(case, races=options.get("races", False)), overlapped(case, **options)
    for name, buffer in expected.buffers():
        assert same_bits(getattr(actual, name), buffer), f"{name} depends on how kernels overlap"


SOME_SEEDS = [seed if seed in (0, 1, 5) else pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS]


@pytest.mark.parametrize("seed", SOME_SEEDS)
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.label)
def test_a_step_is_free_of_races_and_has_the_same_bits(policy: Policy, sequences: int, seed: int) -> None:
    compare_step(step_case(policy, sequences, torch.bfloat16, qk_norm=seed % 2 == 1), seed=seed, races=True)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_a_step_with_prompts_and_several_passes_is_free_of_races(seed: int, qk_norm: bool) -> None:
    """46 rows, in which tokens attend to others of the same step, also in splits before their own; some sequences skip,
    others do not."""
    case = replace(step_case(SKIPS_ALL, 5, torch.bfloat16, qk_norm), prompt_rows=(20, 9, 0, 12, 1))
    # a head is three tiles: blocks that are a pass apart finish them
    compare_step(replace(case, policies=(SKIPS_ALL, DensePolicy()), head_dim=48), seed=seed, races=True)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("seed", [0, 3])
def test_each_switch_changes_no_bit(switch: str, seed: int) -> None:
    compare_step(step_case(SKIPS_ALL, 3, torch.bfloat16), seed=seed, races=True, **{switch: False})


@pytest.mark.parametrize("seed", [0, 4])
def test_everything_switched_off_is_free_of_races(seed: int) -> None:
    compare_step(step_case(SKIPS_ALL, 1, torch.float16), seed=seed, races=True, **dict.fromkeys(SWITCHES, False))


def test_rows_that_are_all_idle_touch_nothing() -> None:
    case = replace(step_case(SKIPS_ALL, 2, torch.float32), active=(False, False))
    before = case.state()
    after, _ = overlapped(case, races=True)
    for name, buffer in before.buffers():
        assert same_bits(getattr(after, name), buffer), name


def test_a_prefetch_that_does_not_wait_for_the_gate_is_a_race() -> None:
    def run() -> None:
        for seed in SEEDS:
            broken = "prefetches before the wait"
            overlapped(step_case(SKIPS_ALL, 1, torch.bfloat16), seed=seed, races=True, broken=broken)

    with pytest.raises(AssertionError, match=r"race: .* of global memory .*skip_gate.cuh"):
        run()


def run_behind_skipped(ops: list[tuple[str, int]], broken: str = "") -> None:
    """Instructions of two layers in an order of their own, where layer 1's FFN is skipped and so triggers early."""
    case = step_case(SKIPS_ALL, 3, torch.bfloat16)
    weights, state = case.weights(), case.state()
    state.run_ffn[1], state.skip_remaining[:] = 0, 9
    program = case.program(weights, state)
    chosen = tuple([ins for ins in program if ins.op == op][layer] for op, layer in ops)
    for seed in SEEDS:
        state.run_ffn[2] = state.active
        HostKernels(chosen, state, seed=seed, races=True, broken=broken).run_overlapped()


@pytest.mark.parametrize("between", [[], [("down_proj_add", 1)], [("gate_up_act", 1), ("down_proj_add", 1)]])
def test_flags_are_not_read_while_a_gate_writes_them_behind_kernels_that_trigger_early(
    between: list[tuple[str, int]],
) -> None:
    ops = [("skip_gate", 2), *between, ("gate_up_act", 2)]
    run_behind_skipped(ops)
    with pytest.raises(AssertionError, match=r"race: .* of global memory"):
        run_behind_skipped(ops, broken="flags are said to be settled")


def test_stamps_tell_when_kernels_ran() -> None:
    case = step_case(SKIPS_ALL, 1, torch.bfloat16)
    _, kernels = overlapped(case)
    program = case.program(case.weights(), case.state())
    own = [index for index, ins in enumerate(program) if ins.op != "skip_gate"]
    began, waited, ended = kernels.stamps[own].T.tolist()
    assert kernels.stamps[[index for index in range(len(program)) if index not in own], 2].tolist() == [0] * 4
    assert ended == sorted(ended)
    for index in range(1, len(own)):
        assert began[index] < ended[index]
        skipped = program[own[index]].op in ("gate_up_act", "down_proj_add") and waited[index] < 0
        assert skipped or ended[index - 1] < waited[index] < ended[index]
    assert any(began[index] < ended[index - 1] for index in range(1, len(own)))  # they overlap
