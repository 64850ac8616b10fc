"""The Triton kernels do what the reference does: every buffer is compared after every instruction."""

from collections.abc import Collection
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from skipkernels.kernels.triton import TRITON
from skipkernels.program.state import LAYOUTS
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, Policy, RandomPolicy, SkipPolicy, TimingPolicy
from tests.executors.programs import Case, compare_program
from tests.executors.strategies import cases
from tests.kernels.triton.interpreted.executor import TritonExecutor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUT = LAYOUTS["cuda"]
MATRIX_OPS = ("qkv_rope_append", "o_proj_add", "gate_up_silu", "down_proj_add", "lm_head")


def check(case: Case, ops: Collection[str] = tuple(TRITON)) -> None:
    compare_program(case, lambda program, state: TritonExecutor(program, state, ops))


def small(case: Case) -> Case:
    """The interpreter takes some 10 ms for every program of a grid."""
    return replace(
        case,
        hidden_size=case.hidden_size % 40 + 1,
        intermediate_size=case.intermediate_size % 20 + 1,
        vocab_size=case.vocab_size % 40 + 2,
        head_dim=min(case.head_dim, 10),
        num_key_value_heads=min(case.num_key_value_heads, 2),
        group_size=min(case.group_size, 3),
        batch_size=min(case.batch_size, 5),
        seq_lens=case.seq_lens[:5],
        active=case.active[:5],
    )


def plain_case(batch_size: int, dtype: torch.dtype, **changes: object) -> Case:
    case = Case(
        batch_size=batch_size,
        seq_lens=tuple((7 * row) % 11 for row in range(batch_size)),
        active=(True,) * batch_size,
        hidden_size=19,
        intermediate_size=20,
        vocab_size=23,
        head_dim=6,
        num_key_value_heads=1,
        group_size=2,
        sliding_window=None,
        qk_norm=False,
        qkv_bias=False,
        o_proj_bias=False,
        dtype=dtype,
        policy=DensePolicy(),
        seed=batch_size,
        num_layers=1,
        layout=LAYOUT,
    )
    return replace(case, **changes)  # type: ignore[arg-type]


@settings(max_examples=4)
@given(case=cases(layout=LAYOUT))
def test_every_buffer_agrees_after_every_instruction(case: Case) -> None:
    check(small(case))


@pytest.mark.slow
@settings(max_examples=60, derandomize=False)
@given(case=cases(layout=LAYOUT))
def test_every_buffer_agrees_in_a_long_sweep(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("batch_size", range(1, 17))
def test_every_batch_size_agrees(batch_size: int) -> None:
    """``sample`` has a program for each row, so that a batch is nothing new to it."""
    dtype = DTYPES[batch_size % 3] if batch_size > 1 else torch.bfloat16
    check(plain_case(batch_size, dtype), [op for op in TRITON if op != "sample"])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", range(1, 17))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_batch_size_agrees_in_every_dtype(batch_size: int, dtype: torch.dtype) -> None:
    check(plain_case(batch_size, dtype, hidden_size=49, intermediate_size=70, head_dim=20, qk_norm=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_long_rows_take_several_tiles(batch_size: int, dtype: torch.dtype) -> None:
    case = plain_case(batch_size, dtype, hidden_size=2100, vocab_size=9)
    check(case, ["lm_head"])
    check(plain_case(batch_size, dtype, intermediate_size=2100), ["down_proj_add"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_matrices_of_many_rows_take_large_tiles(batch_size: int, dtype: torch.dtype) -> None:
    check(plain_case(batch_size, dtype, vocab_size=8300), ["lm_head"])
    check(plain_case(batch_size, dtype, intermediate_size=4150), ["gate_up_silu"])
    check(plain_case(batch_size, dtype, hidden_size=8300), ["o_proj_add", "down_proj_add"])


@pytest.mark.parametrize("rows_per_partial", [1, 24])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_partials_may_be_cut_anywhere(batch_size: int, rows_per_partial: int) -> None:
    policy = SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=0)
    layout = replace(LAYOUT, rows_per_partial=rows_per_partial)
    case = plain_case(batch_size, torch.float32, hidden_size=53, num_layers=2, policy=policy, layout=layout)
    check(case, ["down_proj_add", "skip_gate"])


@pytest.mark.parametrize("sliding_window", [None, 1, 64, 100])
@pytest.mark.parametrize("kv_split", [64, 24])
def test_attention_over_several_splits(kv_split: int, sliding_window: int | None) -> None:
    layout = replace(LAYOUT, kv_split=kv_split)
    case = plain_case(2, torch.bfloat16, seq_lens=(130, 63), sliding_window=sliding_window, layout=layout)
    check(replace(case, num_layers=2), ["decode_attention"])  # the last layer has no window


def test_attention_merges_more_splits_than_it_holds_at_once() -> None:
    layout = replace(LAYOUT, kv_split=2)
    check(plain_case(1, torch.float32, seq_lens=(90,), layout=layout), ["decode_attention"])


@pytest.mark.parametrize(
    "policy",
    [
        SkipPolicy(threshold=-1.0, span=2, cold_start=0, cold_end=1, warmup_tokens=3),
        SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="majority"),
        SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="all"),
        SkipPolicy(threshold=0.7, span=2, cold_start=0, cold_end=0, warmup_tokens=2, target_ratio=0.3),
        FixedPolicy((0, 2), warmup_tokens=2),
        RandomPolicy(0.5, seed=-3, cold_start=0, cold_end=0, warmup_tokens=2),
        TimingPolicy(0.25),
    ],
    ids=lambda policy: policy.label,
)
def test_every_policy_agrees(policy: Policy) -> None:
    """Rows in and past their warm-up, with and without a prompt before them, and an idle one."""
    case = plain_case(
        5,
        torch.float32,
        seq_lens=(9, 30, 12, 0, 25),
        active=(True, True, False, True, True),
        policy=policy,
        num_layers=4,
    )
    check(case, ["skip_gate", "gate_up_silu", "down_proj_add", "advance"])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_skipped_ffn_reads_none_of_its_weights(batch_size: int) -> None:
    case = plain_case(batch_size, torch.bfloat16, num_layers=2)
    weights, state = case.weights(), case.state()
    for matrix in (weights.layers[1].gate_up_proj, weights.layers[1].down_proj):
        matrix.fill_(float("nan"))
    state.run_ffn[1] = 0
    program = case.program(weights, state)
    executor = TritonExecutor(program, state, [op for op in TRITON if op != "sample"])
    (first, second) = (i for i, ins in enumerate(program) if ins.op == "gate_up_silu")
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
    """In a batch, a row's result does not depend on which other rows are active."""
    case = plain_case(3, torch.bfloat16, seq_lens=(4, 5, 6))
    together, alone = case.state(), replace(case, active=(False, True, False)).state()
    for state in (together, alone):
        program = case.program(case.weights(), state)
        for index, ins in enumerate(program[:-2]):
            TritonExecutor(program, state, [op]).run_instruction(index)
            if ins.op == op:
                break
    for name in ("query", "hidden_states", "intermediate", "logits"):
        rows = getattr(together, name)[1], getattr(alone, name)[1]
        assert torch.equal(rows[0].nan_to_num(-7.0), rows[1].nan_to_num(-7.0))
