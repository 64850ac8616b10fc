"""Rows are tokens: prompts beside decode rows, paged caches, many sequences, rows that wait for a block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skipkernels.program import Program
from skipkernels.program.state import DECODING, ENDED, LAYOUTS, WAITS_FOR_BLOCK, DecodeState
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, Policy, RandomPolicy, SkipPolicy
from tests.cuda.comparison import case, compare_op
from tests.cuda.kernels import HostKernels
from tests.executors.programs import Case, compare_program, same_bits

EVERY_KIND: tuple[Policy, ...] = (
    DensePolicy(),
    SkipPolicy(threshold=0.7, span=2, cold_start=0, cold_end=0, warmup_tokens=2),
    SkipPolicy(threshold=0.3, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="majority"),
    SkipPolicy(threshold=0.3, span=2, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="all"),
    SkipPolicy(threshold=0.7, span=2, cold_start=0, cold_end=0, warmup_tokens=2, target_ratio=0.3),
    FixedPolicy((1, 2), warmup_tokens=1),
    RandomPolicy(0.5, seed=3, cold_start=0, cold_end=0, warmup_tokens=1),
)


def check(case: Case, **options: int) -> None:
    compare_program(case, lambda program, state: HostKernels(program, state, **options))


def with_blocks_of(case: Case, block_size: int) -> Case:
    return replace(case, layout=replace(case.layout, block_size=block_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [16, 64])
def test_prompts_run_beside_decode_rows(block_size: int, dtype: torch.dtype) -> None:
    """43 rows of three sequences, in which tokens attend to others of the same step: three passes over the weights."""
    program = case(
        seq_lens=(21, 70, 18), prompt_rows=(21, 18, 0), num_layers=2, dtype=dtype, qk_norm=True, policies=EVERY_KIND[:2]
    )
    check(with_blocks_of(program, block_size), seed=block_size % 6)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("active", [(False, False, True), (False,) * 3])
def test_prompt_rows_without_their_decode_rows(active: tuple[bool, ...], qk_norm: bool) -> None:
    """A chunk in the middle of a prompt: nothing is sampled, and advance clears the rows all the same."""
    check(case(seq_lens=(40, 9, 70), prompt_rows=(20, 3, 0), active=active, qk_norm=qk_norm, num_layers=2))


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_prompt_rows_rotate_by_three_positions(qk_norm: bool) -> None:
    program = case(seq_lens=(20, 33), prompt_rows=(12, 9), multi_axis=True, qk_norm=qk_norm)
    compare_op("qkv_rope_append", program, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forty_sequences(dtype: torch.dtype) -> None:
    """Three passes, the last of which has one row, between rows that are idle."""
    program = case(
        seq_lens=tuple(index * 7 % 90 for index in range(40)),
        active=tuple(index % 6 != 5 for index in range(40)),
        num_layers=3,
        dtype=dtype,
        qk_norm=True,
        policies=EVERY_KIND,
    )
    assert sum(program.active) == 34
    check(replace(program, active=(*program.active[:-1], False)), seed=4)


@pytest.mark.parametrize("hidden_size", [24, 900])  # partial sums of one turn, and more than are staged at a time
def test_gates_of_many_sequences(hidden_size: int) -> None:
    """More than a turn's 64, each by its own policy; those of one batch rule lie in several turns."""
    count = 141
    program = case(
        seq_lens=(5,) * count,
        active=tuple(index % 9 != 4 for index in range(count)),
        num_layers=4,
        hidden_size=hidden_size,
        intermediate_size=8,
        vocab_size=4,
        head_dim=2,
        num_key_value_heads=1,
        group_size=1,
        dtype=torch.float32,
        policies=EVERY_KIND,
    )
    compare_op("skip_gate", program, seed=hidden_size % 6)


class SharedPrefix(Case):
    """Two sequences whose first 64 positions are cached in the same blocks; nothing is cached in the second's own."""

    def state(self) -> DecodeState:
        state = super().state()
        blocks = 64 // state.block_size
        state.block_table[1, :blocks] = state.block_table[0, :blocks]
        return state


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_sequences_share_the_blocks_of_a_prefix(block_size: int) -> None:
    program = case(seq_lens=(100, 67), prompt_rows=(5, 3), num_layers=2)
    shared = SharedPrefix(**vars(with_blocks_of(program, block_size)))
    state = shared.state()
    assert state.block_table[0, 0] == state.block_table[1, 0] >= 0
    check(shared)


def attention_of(case: Case, state: DecodeState, program: Program, **options: int) -> torch.Tensor:
    """attn_output after the case's (first) decode_attention alone."""
    index = [ins.op for ins in program].index("decode_attention")
    HostKernels(program, state, **options).run_instruction(index)
    return state.attn_output


def moved(state: DecodeState, target: DecodeState) -> DecodeState:
    """``target`` with the query and the cached positions of ``state``, wherever its own blocks lie."""
    target.query.copy_(state.query)
    for sequence in range(state.num_sequences):
        positions = torch.arange(int(state.row_position[sequence]) + 1)
        (source, at), (own, to) = (
            (each.block_table[sequence][positions // each.block_size].long(), positions % each.block_size)
            for each in (state, target)
        )
        for name in ("k_cache", "v_cache"):
            getattr(target, name)[:, own, :, to] = getattr(state, name)[:, source, :, at]
    return target


LENGTHS = (5, 63, 64, 150, 700, 2300)


def attended(case: Case) -> DecodeState:
    """A state with a query in every row, and a key and value at every position."""
    state = case.state()
    for name in ("query", "k_cache", "v_cache"):
        buffer = getattr(state, name)
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(len(name))))
    return state


@pytest.mark.parametrize("head_dim", [16, 160])  # copied to shared memory, and read where it lies
@pytest.mark.parametrize("block_size", [1, 2, 16, 32, 128])
def test_attention_has_the_same_bits_with_blocks_of_any_size(block_size: int, head_dim: int) -> None:
    program = case(seq_lens=LENGTHS, head_dim=head_dim, sliding_window=None, num_key_value_heads=1)
    state = attended(program)
    other_case = with_blocks_of(program, block_size)
    other = moved(state, other_case.state())
    expected = attention_of(program, state, program.program(program.weights(), state))
    actual = attention_of(other_case, other, other_case.program(other_case.weights(), other))
    assert not expected[: len(LENGTHS)].isnan().any()
    assert same_bits(actual, expected)


def test_attention_of_a_row_does_not_depend_on_the_others() -> None:
    """Each row alone, on another number of multiprocessors and under another schedule; decode and prompt rows."""
    program = case(seq_lens=LENGTHS, prompt_rows=(2, 3, 0, 20, 0, 5), num_key_value_heads=1)
    together = attended(program)
    instructions = program.program(program.weights(), together)
    expected = attention_of(program, together, instructions).clone()
    rows = together.active.nonzero()[:, 0].tolist()
    assert len(rows) == len(LENGTHS) + 30
    for row in rows:
        together.active.zero_()
        together.active[row] = 1
        together.attn_output.fill_(torch.nan)
        alone = attention_of(program, together, instructions, num_sms=1 + row % 4, seed=row % 6)
        assert same_bits(alone[row], expected[row]), row
        assert alone.isnan().all(dim=(1, 2)).sum() == len(alone) - 1


def test_a_row_waits_for_its_block_and_goes_on() -> None:
    """At the end of its block a sequence rests; with the next block its tokens are those of one that never waited."""
    size, steps = LAYOUTS["cuda"].block_size, 5
    program = case(seq_lens=(size - 3, 4), num_layers=2, dtype=torch.float32)
    program = replace(program, layout=replace(program.layout, block_size=size))

    def begun(blocks: list[list[int]]) -> tuple[DecodeState, Program, HostKernels]:
        weights, state = program.weights(), Longer(**vars(program)).state()
        for sequence, own in enumerate(blocks):
            state.set_blocks(sequence, own)
        state.max_new_tokens.fill_(steps + 9)
        state.eos_token_ids.fill_(-1)
        instructions = program.program(weights, state)
        return state, instructions, HostKernels(instructions, state)

    def step(instructions: Program, kernels: HostKernels) -> None:
        for index in range(len(instructions)):
            kernels.run_instruction(index)

    state, instructions, kernels = begun([[0, 1], [2]])
    for _ in range(steps):
        step(instructions, kernels)
    expected, generated = state.token_ids.clone(), state.num_generated.clone()
    assert state.progress[:, 1].tolist() == [DECODING, DECODING]

    state, instructions, kernels = begun([[0], [2]])
    for _ in range(steps):
        step(instructions, kernels)
    assert state.progress[:, 1].tolist() == [WAITS_FOR_BLOCK, DECODING]
    assert state.active.tolist()[:2] == [0, 1]
    assert state.run_ffn[:, :2].tolist() == [[0, 1]] * 2
    waited_at = int(state.row_position[0])
    assert waited_at == size
    assert same_bits(state.token_ids[0, : size + 1], expected[0, : size + 1])
    assert int(state.num_generated[0]) == int(generated[0]) - (steps - 3)
    state.set_blocks(0, [1], first=1)
    state.start_decoding(0)
    state.end_sequence(1)
    for _ in range(steps - 3):
        step(instructions, kernels)
    assert state.progress[:, 1].tolist() == [DECODING, ENDED]
    assert same_bits(state.token_ids, expected)


class Longer(Case):
    """With room for more tokens than the case's own rows need."""

    @property
    def max_seq_len(self) -> int:
        return 2 * self.layout.block_size
