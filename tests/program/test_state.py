"""What the host writes into a state's buffers: sequences, policies, blocks and prompt rows, each in its own place."""

import math

import pytest
import torch

from skipkernels.model.config import ModelConfig
from skipkernels.program.state import DECODING, ENDED, DecodeState, Layout
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, Policy, RandomPolicy, SkipPolicy
from tests.executors.programs import same_bits, snapshot
from tests.models import tiny_config
from tests.processes import resident_bytes

LAYERS, SEQUENCES, PROMPT_ROWS, BLOCK_SIZE = 4, 3, 5, 4
POLICY_BUFFERS = (
    "gate_mode",
    "gated",
    "first_gated",
    "gate_threshold",
    "gate_span",
    "warmup_tokens",
    "batch_rule",
    "gate_probability",
    "gate_seed",
    "target_ratio",
    "ramp_tokens",
)


def empty() -> DecodeState:
    config = ModelConfig.from_hf(tiny_config())
    assert config.num_hidden_layers == LAYERS
    return DecodeState.allocate(
        config,
        num_sequences=SEQUENCES,
        num_prompt_rows=PROMPT_ROWS,
        max_seq_len=14,
        dtype=torch.float32,
        layout=Layout(kv_split_size=8, rows_per_partial=24, block_size=BLOCK_SIZE),
    )


def changed(state: DecodeState, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in state.buffers() if not same_bits(tensor, before[name])}


def test_a_new_state_has_no_active_row_and_no_block() -> None:
    state = empty()
    assert not state.active.any()
    assert state.row_sequence.tolist() == [0, 1, 2] + [0] * PROMPT_ROWS
    assert state.block_table.tolist() == [[-1] * 4] * SEQUENCES  # 14 positions lie in four blocks
    assert state.num_blocks == SEQUENCES * 4, "enough for every sequence at its longest"


@pytest.mark.parametrize(
    ("policy", "mode", "gated", "first_gated", "own"),
    [
        (
            SkipPolicy(threshold=0.75, span=2, cold_start=1, cold_end=1, warmup_tokens=7, batch_rule="majority"),
            1,
            [0, 0, 1, 0],
            2,
            {"gate_threshold": [0.75] * 4, "gate_span": 2, "warmup_tokens": 7, "batch_rule": 2, "target_ratio": 0.0},
        ),
        (
            SkipPolicy(0.5, 1, 0, 0, warmup_tokens=0, layer_thresholds=(0.1, 0.2, 0.3, 0.4), target_ratio=0.25),
            1,
            [0, 1, 1, 1],
            1,
            # the token out of the prompt's last position is never skipped for
            {"gate_threshold": [0.1, 0.2, 0.3, 0.4], "warmup_tokens": 1, "target_ratio": 0.25, "ramp_tokens": 64},
        ),
        (FixedPolicy((3, 1), warmup_tokens=2), 2, [0, 1, 0, 1], 1, {"gate_probability": 1.0, "warmup_tokens": 2}),
        (FixedPolicy((0,), warmup_tokens=2), 2, [1, 0, 0, 0], 0, {}),
        (
            RandomPolicy(0.25, seed=-(2**62), cold_start=2, cold_end=0, warmup_tokens=3),
            3,
            [0, 0, 1, 1],
            2,
            {"gate_probability": 0.5, "gate_seed": -(2**62), "warmup_tokens": 3},
        ),
    ],
    ids=lambda value: value.label if isinstance(value, Policy) else "",
)
def test_a_policy_is_written_for_its_sequence_only(
    policy: Policy, mode: int, gated: list[int], first_gated: int, own: dict[str, float | list[float]]
) -> None:
    state = empty()
    state.set_policy(0, FixedPolicy((2,), warmup_tokens=9).plan(LAYERS))
    before = snapshot(state)
    state.set_policy(1, policy.plan(LAYERS))
    assert changed(state, before) <= set(POLICY_BUFFERS)
    expected = {"gate_mode": mode, "gated": gated, "first_gated": first_gated, **own}
    for name, value in expected.items():
        assert getattr(state, name)[..., 1].tolist() == pytest.approx(value), name
    for name in POLICY_BUFFERS:
        for other in (0, 2):
            assert same_bits(getattr(state, name)[..., other : other + 1], before[name][..., other : other + 1]), name


def test_a_dense_sequence_after_one_that_skipped_is_gated_nowhere() -> None:
    state = empty()
    state.set_policy(1, FixedPolicy((0, 2)).plan(LAYERS))
    state.set_policy(1, DensePolicy().plan(LAYERS))
    assert state.gate_mode.tolist() == [0, 0, 0]
    assert not state.gated.any()


def test_blocks_are_written_from_an_entry_on_and_empty_what_is_behind_them() -> None:
    state = empty()
    state.set_blocks(1, [5, 0, 7])
    state.set_blocks(2, [1])
    assert state.block_table.tolist() == [[-1] * 4, [5, 0, 7, -1], [1, -1, -1, -1]]
    state.set_blocks(1, [9], first=1)
    assert state.block_table[1].tolist() == [5, 9, -1, -1]
    state.set_blocks(1, [])
    assert state.block_table.tolist() == [[-1] * 4, [-1] * 4, [1, -1, -1, -1]]


def test_a_copied_block_is_the_same_in_every_layer() -> None:
    state = empty()
    for cache in (state.k_cache, state.v_cache):
        cache.copy_(torch.randn(cache.shape, generator=torch.Generator().manual_seed(0)))
    before = snapshot(state)
    state.copy_block(2, 7)
    for name in ("k_cache", "v_cache"):
        now, then = getattr(state, name), before[name]
        assert torch.equal(now[:, 7], then[:, 2])
        others = [block for block in range(state.num_blocks) if block != 7]
        assert torch.equal(now[:, others], then[:, others])


def test_a_sequence_begins_afresh_in_a_slot_that_was_used() -> None:
    state = empty()
    for name in ("token_ids", "num_generated", "run_ffn", "skip_remaining", "skipped", "threshold_scale", "similarity"):
        getattr(state, name).fill_(3)
    state.seen.fill_(1)
    before = snapshot(state)
    state.begin_sequence(1, torch.tensor([8, 4, 8, 6], dtype=torch.int32), num_generated=2)
    assert state.token_ids[1].tolist() == [8, 4, 8, 6] + [0] * 11
    assert state.seen[1].nonzero()[:, 0].tolist() == [4, 6, 8]
    assert (state.input_ids[1], state.row_position[1], state.num_generated[1]) == (6, 3, 2)
    assert state.progress[1].tolist() == [2, DECODING]
    assert not state.active.any()
    assert (state.skip_remaining[1], state.skipped[1], state.threshold_scale[1]) == (0, 0, 1.0)
    assert not state.run_ffn[:, 1].any()
    assert state.similarity[:, 1].tolist() == pytest.approx([math.nan] * LAYERS, nan_ok=True)
    for name in ("token_ids", "seen", "num_generated", "skip_remaining", "skipped", "threshold_scale", "progress"):
        assert torch.equal(getattr(state, name)[[0, 2]], before[name][[0, 2]]), name
    state.start_decoding(1)
    assert state.active.tolist() == [0, 1, 0] + [0] * PROMPT_ROWS
    assert state.decode_rows.tolist() == [0, 1, 0]
    assert state.run_ffn[:, 1].tolist() == [1] * LAYERS
    state.end_sequence(1)
    assert not state.active.any()
    assert not state.run_ffn[:, 1].any()
    assert state.progress[1].tolist() == [2, ENDED]


def test_prompt_rows_stand_behind_the_decode_rows() -> None:
    state = empty()
    before = snapshot(state)
    state.set_prompt_rows(1, 2, 5, torch.tensor([9, 8, 7], dtype=torch.int32))
    rows = ["input_ids", "row_sequence", "row_position", "active"]
    assert changed(state, before) == {*rows, "run_ffn", "prompt_positions"}
    assert state.input_ids.tolist() == [0, 0, 0, 0, 9, 8, 7, 0]
    assert state.row_sequence.tolist() == [0, 1, 2, 0, 2, 2, 2, 0]
    assert state.row_position.tolist() == [0, 0, 0, 0, 5, 6, 7, 0]
    assert state.active.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]
    assert state.run_ffn.tolist() == [[0, 0, 0, 0, 1, 1, 1, 0]] * LAYERS
    assert state.prompt_positions.tolist() == [[0] * 3, [5] * 3, [6] * 3, [7] * 3, [0] * 3]


def test_prompt_rows_may_have_embeddings_positions_and_ffns_left_out() -> None:
    state = empty()
    hidden = state.hidden_states.shape[1]
    embeddings = torch.arange(2.0)[:, None].expand(2, hidden) + 1
    run_map = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.uint8)
    positions = torch.tensor([[-2, 3], [4, 5], [6, 7]], dtype=torch.int32)
    ids = torch.tensor([9, 8], dtype=torch.int32)
    state.set_prompt_rows(2, 0, 3, ids, run_map=run_map, embeddings=embeddings, positions=positions)
    assert state.input_ids[SEQUENCES:].tolist() == [0, 0, -1, -1, 0]
    assert state.row_position[SEQUENCES:].tolist() == [0, 0, 3, 4, 0]
    assert state.prompt_embeddings[:, 0].tolist() == [0, 0, 1, 2, 0]
    assert state.prompt_positions.tolist() == [[0] * 3, [0] * 3, [-2, 4, 6], [3, 5, 7], [0] * 3]
    assert state.run_ffn[:, SEQUENCES:].T.tolist() == [[0] * 4, [0] * 4, [1, 0, 1, 1], [0, 1, 1, 0], [0] * 4]


def test_a_cache_takes_memory_only_where_it_is_used() -> None:
    config = ModelConfig.from_hf(tiny_config())
    before = resident_bytes()
    state = DecodeState.allocate(config, num_sequences=1, max_seq_len=64, num_blocks=1 << 13, dtype=torch.float32)
    cache = state.k_cache.nbytes + state.v_cache.nbytes
    assert cache > 100e6
    assert resident_bytes() - before < 0.1 * cache
    state.k_cache[1] = 1.0
    assert resident_bytes() - before > 0.8 * state.k_cache[1].nbytes
    assert not state.k_cache[0].any()
    assert not state.v_cache.any()
