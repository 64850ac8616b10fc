"""The Triton kernels do what the reference does: every buffer is compared after every instruction."""

from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from skipkernels.kernels.triton import TRITON
from skipkernels.program.state import LAYOUTS
from skipkernels.skipping.policy import (
    DensePolicy,
    FixedPolicy,
    NeuronPolicy,
    Policy,
    RandomPolicy,
    SkipPolicy,
    TimingPolicy,
)
from tests.executors.programs import Case, compare_program
from tests.executors.strategies import cases
from tests.kernels.triton.interpreted.executor import TritonExecutor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUT = LAYOUTS["cuda"]
MATRIX_OPS = ("qkv_rope_append", "o_proj_add", "gate_up_act", "down_proj_add", "lm_head")
NEURON_OPS = ("neuron_gate", "gate_proj_act", "select_neurons", "up_proj_mul", "down_proj_neurons_add")
NEURONS = NeuronPolicy(gate_thresholds=(0.3, 0.0), product_thresholds=(0.2, 0.1), warmup_tokens=0)
HELD = NeuronPolicy(gate_thresholds=(0.3, 0.5), product_thresholds=(0.2, 0.1), warmup_tokens=1, target_ratio=0.2)


def check(case: Case, ops: Collection[str] = tuple(TRITON)) -> None:
    compare_program(case, lambda program, state: TritonExecutor(program, state, ops))


def small(case: Case) -> Case:
    """The interpreter takes some 10 ms for every program of a grid."""
    return replace(
        case,
        hidden_size=case.hidden_size % 40 + 1,
        intermediate_size=case.intermediate_size % 20 + 4,  # the largest of fewer may be a cancelled sum: no measure
        vocab_size=case.vocab_size % 40 + 2,
        head_dim=min(case.head_dim, 10),
        num_key_value_heads=min(case.num_key_value_heads, 2),
        group_size=min(case.group_size, 3),
        seq_lens=case.seq_lens[:4],
        active=case.active[:4],
        prompt_rows=tuple(min(chunk, 3) for chunk in case.prompt_rows[:4]),
    )


def plain_case(num_sequences: int, dtype: torch.dtype, **changes: object) -> Case:
    case = Case(
        seq_lens=tuple((7 * slot) % 11 for slot in range(num_sequences)),
        active=(True,) * num_sequences,
        hidden_size=19,
        intermediate_size=20,
        vocab_size=23,
        head_dim=6,
        num_key_value_heads=1,
        group_size=2,
        dtype=dtype,
        policies=(DensePolicy(),),
        seed=num_sequences,
        num_layers=1,
        layout=LAYOUT,
    )
    return replace(case, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"post_norms_only": True, "num_key_value_heads": 3},
        {"post_norms_only": True, "rotary_share": 0.6, "qkv_bias": True, "head_dim": 10},
        {"rotary_share": 0.6, "head_dim": 10},
        {"rotary_share": 0.6, "head_dim": 10, "qk_norm": True, "grows_queries": True, "sinks": True},
        {"softcap": 1.5, "branch_norms": True, "grows_queries": True},
    ],
    ids=str,
)
def test_what_single_families_do_agrees(changes: dict[str, object], dtype: torch.dtype) -> None:
    check(plain_case(3, dtype, prompt_rows=(2, 0, 1), seq_lens=(4, 7, 9), num_layers=2, **changes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sequences", [1, 3, 5])
def test_experts_agree(num_sequences: int, dtype: torch.dtype) -> None:
    policy = SkipPolicy(threshold=0.3, span=1, cold_start=0, cold_end=0, warmup_tokens=0)
    changes = {"num_experts": 6, "num_layers": 3, "policies": (policy,), "hidden_size": 21, "idle_rows": 0}
    if num_sequences > 1:  # as gpt-oss
        changes |= {"expert_biases": True, "activation": "clamped_swiglu"}
    case = plain_case(num_sequences, dtype, **changes)
    check(case if num_sequences < 5 else replace(case, prompt_rows=(2, 0, 1, 0, 3), seq_lens=(4, 7, 9, 0, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_neurons_of_experts_agree(num_sequences: int, dtype: torch.dtype) -> None:
    """The second layer has no experts. Also the dense program of weights that lie so."""
    changes = {"num_experts": 6, "num_layers": 2, "hidden_size": 21, "idle_rows": 0, "neuron_rows": True}
    if num_sequences > 1:  # as gpt-oss
        changes |= {"expert_biases": True, "activation": "clamped_swiglu"}
    for policies in ((NEURONS, HELD, DensePolicy()), (DensePolicy(),)):
        check(plain_case(num_sequences, dtype, policies=policies, **changes))


@settings(max_examples=4)
@given(case=cases(layout=LAYOUT, max_sequences=4))
def test_every_buffer_agrees_after_every_instruction(case: Case) -> None:
    check(small(case))


@pytest.mark.slow
@settings(max_examples=60, derandomize=False)
@given(case=cases(layout=LAYOUT))
def test_every_buffer_agrees_in_a_long_sweep(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("rows", [*range(1, 18), 33])
def test_every_number_of_rows_agrees(rows: int) -> None:
    """``sample`` has a program for each row, so that more of them are nothing new to it."""
    dtype = DTYPES[rows % 3] if rows > 1 else torch.bfloat16
    check(plain_case(rows, dtype, idle_rows=0), [op for op in TRITON if op != "sample"])


@pytest.mark.slow
@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_rows_agrees_in_every_dtype(rows: int, dtype: torch.dtype) -> None:
    check(plain_case(rows, dtype, idle_rows=0, hidden_size=49, intermediate_size=70, head_dim=20, qk_norm=True))


@pytest.mark.parametrize("multi_axis", [False, True])
@pytest.mark.parametrize("block_size", [16, 3])
def test_prompt_rows_in_several_tiles_agree(block_size: int, multi_axis: bool) -> None:
    """20 rows of prompts beside 4 of sequences, one of which is idle: tokens, tokens computed again, embeddings."""
    case = plain_case(
        4,
        torch.float16,
        seq_lens=(9, 12, 8, 5),
        active=(True, True, True, False),
        prompt_rows=(6, 9, 5, 0),
        head_dim=10,
        qk_norm=True,
        num_layers=2,
        policies=(SkipPolicy(threshold=0.3, span=1, cold_start=0, cold_end=0, warmup_tokens=0), DensePolicy()),
        multi_axis=multi_axis,
        layout=replace(LAYOUT, block_size=block_size),
    )
    check(case, [op for op in TRITON if op != "sample"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_long_rows_take_several_tiles(rows: int, dtype: torch.dtype) -> None:
    check(plain_case(rows, dtype, idle_rows=0, hidden_size=2100, vocab_size=9), ["lm_head"])
    check(plain_case(rows, dtype, idle_rows=0, intermediate_size=2100), ["down_proj_add"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_matrices_of_many_rows_take_large_tiles(rows: int, dtype: torch.dtype) -> None:
    check(plain_case(rows, dtype, idle_rows=0, vocab_size=8300), ["lm_head"])
    check(plain_case(rows, dtype, idle_rows=0, intermediate_size=4150), ["gate_up_act"])
    check(plain_case(rows, dtype, idle_rows=0, hidden_size=8300), ["o_proj_add", "down_proj_add"])


@pytest.mark.parametrize("rows_per_partial", [1, 24])
@pytest.mark.parametrize("prompt_rows", [(), (2,)])
def test_partials_may_be_cut_anywhere(prompt_rows: tuple[int, ...], rows_per_partial: int) -> None:
    policy = SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=0)
    case = plain_case(
        1,
        torch.float32,
        seq_lens=(4,),
        prompt_rows=prompt_rows,
        idle_rows=0,
        hidden_size=53,
        num_layers=2,
        policies=(policy,),
        layout=replace(LAYOUT, rows_per_partial=rows_per_partial),
    )
    check(case, ["down_proj_add", "skip_gate"])


@pytest.mark.parametrize("sliding_window", [None, 1, 64, 100])
@pytest.mark.parametrize(("kv_split_size", "block_size"), [(64, 32), (24, 64)])
def test_attention_over_several_splits(kv_split_size: int, block_size: int, sliding_window: int | None) -> None:
    case = plain_case(
        2,
        torch.bfloat16,
        seq_lens=(130, 63),
        prompt_rows=(2, 0),
        sliding_window=sliding_window,
        num_layers=2,  # the last layer has no window
        layout=replace(LAYOUT, kv_split_size=kv_split_size, block_size=block_size),
    )
    check(case, ["decode_attention"])


def test_attention_merges_more_splits_than_it_holds_at_once() -> None:
    layout = replace(LAYOUT, kv_split_size=2)
    check(plain_case(1, torch.float32, seq_lens=(90,), layout=layout), ["decode_attention"])


ALL = SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="all")
MAJORITY = SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="majority")
POLICIES = (
    SkipPolicy(threshold=-1.0, span=2, cold_start=0, cold_end=1, warmup_tokens=3),
    MAJORITY,
    ALL,
    SkipPolicy(threshold=0.7, span=2, cold_start=0, cold_end=0, warmup_tokens=2, target_ratio=0.3),
    FixedPolicy((0, 2), warmup_tokens=2),
    RandomPolicy(0.5, seed=-3, cold_start=0, cold_end=0, warmup_tokens=2),
    TimingPolicy(0.25),
)
GATED_OPS = ("skip_gate", "gate_up_act", "down_proj_add", "advance")


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.label)
def test_every_policy_agrees(policy: Policy) -> None:
    """Sequences in and past their warm-up, with and without a prompt before them, and an idle one."""
    case = plain_case(
        5,
        torch.float32,
        seq_lens=(9, 30, 12, 0, 25),
        active=(True, True, False, True, True),
        policies=(policy,),
        num_layers=4,
    )
    check(case, GATED_OPS)


def test_policies_beside_one_another_agree() -> None:
    """Groups that decide together decide among themselves, whoever else is in the step."""
    policies = (*POLICIES, DensePolicy(), MAJORITY, ALL)
    case = plain_case(20, torch.float32, policies=policies, hidden_size=5, num_layers=4)
    check(case, ["skip_gate"])


@pytest.mark.parametrize("rows", [1, 2])
def test_a_skipped_ffn_reads_none_of_its_weights(rows: int) -> None:
    case = plain_case(rows, torch.bfloat16, idle_rows=0, num_layers=2)
    weights, state = case.weights(), case.state()
    for matrix in (weights.layers[1].gate_up_proj, weights.layers[1].down_proj):
        matrix.fill_(float("nan"))
    state.run_ffn[1] = 0
    program = case.program(weights, state)
    executor = TritonExecutor(program, state, [op for op in TRITON if op != "sample"])
    (first, second) = (i for i, ins in enumerate(program) if ins.op == "gate_up_act")
    for index in range(second):
        executor.run_instruction(index)
    before = state.hidden_states.clone(), state.intermediate.clone()
    executor.run_instruction(second)
    executor.run_instruction(second + 1)
    assert program[second + 1].op == "down_proj_add"
    assert first < second
    assert torch.equal(state.hidden_states, before[0])
    assert torch.equal(state.intermediate, before[1])
    assert state.hidden_states.isfinite().all()


@pytest.mark.parametrize("op", MATRIX_OPS)
def test_rows_alone_and_together_agree_bit_by_bit(op: str) -> None:
    """A row's result does not depend on which other rows are active."""
    case = plain_case(3, torch.bfloat16, seq_lens=(4, 5, 6), prompt_rows=(0, 2, 3))
    together, alone = case.state(), replace(case, active=(False, True, False)).state()
    alone.active[5:] = 0  # the third sequence's prompt rows
    alone.run_ffn[:, 5:] = 0
    for state in (together, alone):
        program = case.program(case.weights(), state)
        for index, ins in enumerate(program[:-2]):
            TritonExecutor(program, state, [op]).run_instruction(index)
            if ins.op == op:
                break
    for name in ("query", "hidden_states", "intermediate", "logits"):
        buffers = getattr(together, name), getattr(alone, name)
        for row in (1, 3, 4) if len(buffers[0]) > 3 else (1,):
            assert torch.equal(buffers[0][row].nan_to_num(-7.0), buffers[1][row].nan_to_num(-7.0))


@pytest.mark.parametrize("rows", [1, 2, 5, 18])
def test_neurons_are_left_out_for_every_number_of_rows(rows: int) -> None:
    policies = (NEURONS, HELD, DensePolicy())
    changes = {"neuron_rows": True, "num_layers": 2, "intermediate_size": 70, "hidden_size": 37}
    check(plain_case(rows, DTYPES[rows % 3], policies=policies, **changes), NEURON_OPS)


def test_neurons_are_listed_in_several_blocks() -> None:
    """More than one warp's 512, so that the list goes on where the block before it ended; no row wants any at last."""
    case = plain_case(2, torch.float32, neuron_rows=True, num_layers=2, policies=(NEURONS,), intermediate_size=9000)
    check(replace(case, hidden_size=3, vocab_size=3), ["select_neurons"])
    check(replace(case, active=(False, False), intermediate_size=20), ["select_neurons"])


def test_neurons_of_prompt_rows_and_idle_rows() -> None:
    rows = {"seq_lens": (9, 12, 8), "active": (True, False, True), "prompt_rows": (4, 3, 5)}
    changes = {"neuron_rows": True, "num_layers": 2, "policies": (NEURONS, HELD), "branch_norms": True}
    check(plain_case(3, torch.bfloat16, **rows, **changes), NEURON_OPS)


def test_a_gate_that_is_its_threshold_is_kept() -> None:
    case = plain_case(1, torch.float32, idle_rows=0, neuron_rows=True, num_layers=2, policies=(NEURONS,))
    state = case.state()
    (first, *_) = [ins for ins in case.program(case.weights(), state) if ins.op == "select_neurons"]
    state.intermediate.copy_(torch.linspace(-1, 1, case.intermediate_size))
    state.gate_thresholds[0, 0], state.neuron_scale[0] = state.intermediate[0].abs(), 1.0
    TRITON["select_neurons"](first)
    assert int(state.num_neurons) == case.intermediate_size
