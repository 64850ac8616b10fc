"""Keys and values in blocks: appended where the table says, and read as if they lay one after the other."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from skipkernels import _C
from skipkernels.program.reference import decode_attention, qkv_rope_append
from skipkernels.program.table import Instruction, instruction
from tests.executors.programs import same_bits
from tests.program.native import run_natively
from tests.tolerances import assert_close

Run = Callable[[Instruction], None]
RUNS = {"reference": (qkv_rope_append, decode_attention), "native": (run_natively, run_natively)}
both = pytest.mark.parametrize("runs", RUNS.values(), ids=list(RUNS))
POSITIONS, HEADS, KV_HEADS, HEAD_DIM, SPLIT = 128, 4, 2, 10, 64
CONTIGUOUS = POSITIONS
"""As a block size: every sequence is one block."""


@dataclass(frozen=True)
class Rows:
    """The rows of a step: which sequence each is of, and at which position. The first are the decode rows."""

    sequences: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def num_sequences(self) -> int:
        return max(self.sequences) + 1

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "row_sequence": torch.tensor(self.sequences, dtype=torch.int32),
            "row_position": torch.tensor(self.positions, dtype=torch.int32),
        }


ROWS = Rows(sequences=(0, 1, 2, 0, 0, 1, 2), positions=(100, 1, 64, 99, 98, 0, 63))
"""Decode rows of three sequences, and the ends of their prompts as prompt rows."""


def scattered(block_size: int, num_sequences: int, seed: int = 0) -> tuple[torch.Tensor, int]:
    """A table that gives every sequence its blocks in no order, and the number of blocks in the pool: some are free."""
    table = POSITIONS // block_size
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(num_sequences * table + 2, generator=generator)[: num_sequences * table]
    return blocks.view(num_sequences, table).to(torch.int32), num_sequences * table + 2


def paged(contiguous: torch.Tensor, table: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """[sequences, kv_heads, positions, head_dim] in blocks; NaN in those no sequence has."""
    size = POSITIONS // table.shape[1]
    cache = torch.full((num_blocks, KV_HEADS, size, HEAD_DIM), float("nan"), dtype=contiguous.dtype)
    for sequence, blocks in enumerate(table.tolist()):
        for number, block in enumerate(blocks):
            cache[block] = contiguous[sequence, :, number * size : (number + 1) * size]
    return cache


def gathered(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The inverse of ``paged``."""
    return cache[table.long()].transpose(1, 2).flatten(2, 3)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def append(run: Run, rows: Rows, table: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, ...]:
    """Query, k_cache and v_cache after random rows were appended to caches of NaN."""
    hidden, qkv = 12, (HEADS + 2 * KV_HEADS) * HEAD_DIM
    angles = torch.arange(POSITIONS)[:, None] * 50.0 ** (-torch.arange(HEAD_DIM // 2) / 5)
    cache = torch.full((num_blocks, KV_HEADS, POSITIONS // table.shape[1], HEAD_DIM), float("nan"))
    ins = instruction(
        "qkv_rope_append",
        row_mask=torch.ones(len(rows.sequences), dtype=torch.int32),
        # a row's own: that of its sequence and position
        hidden_states=random(rows.num_sequences, POSITIONS, hidden, seed=1)[rows.sequences, rows.positions],
        input_layernorm=random(hidden, seed=2),
        qkv_proj=random(qkv, hidden, seed=3),
        rope_cos=angles.cos(),
        rope_sin=angles.sin(),
        query=torch.zeros(len(rows.sequences), HEADS, HEAD_DIM),
        k_cache=cache,
        v_cache=cache.clone(),
        block_table=table,
        rms_norm_eps=1e-5,
        **rows.tensors(),
    )
    run(ins)
    return ins.tensors["query"], ins.tensors["k_cache"], ins.tensors["v_cache"]


@both
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_rows_are_appended_where_the_table_says(runs: tuple[Run, Run], block_size: int) -> None:
    table, num_blocks = scattered(block_size, ROWS.num_sequences)
    query, *caches = append(runs[0], ROWS, table, num_blocks)
    expected_query, *contiguous = append(runs[0], ROWS, *scattered(CONTIGUOUS, ROWS.num_sequences))
    assert same_bits(query, expected_query)
    written = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for sequence, position in zip(ROWS.sequences, ROWS.positions, strict=True):
        written[table[sequence, position // block_size], position % block_size] = True
    one_block = scattered(CONTIGUOUS, ROWS.num_sequences)[0]
    for cache, expected in zip(caches, contiguous, strict=True):
        assert torch.equal(cache.isfinite().all(dim=3), written[:, None].expand(-1, KV_HEADS, -1))
        assert torch.equal(cache.isnan().all(dim=3), ~written[:, None].expand(-1, KV_HEADS, -1))
        assert same_bits(gathered(cache, table), gathered(expected, one_block))


@both
def test_a_prompt_row_appends_what_a_decode_row_at_its_position_does(runs: tuple[Run, Run]) -> None:
    table, num_blocks = scattered(32, ROWS.num_sequences)
    query, *caches = append(runs[0], ROWS, table, num_blocks)
    for row, (sequence, position) in enumerate(zip(ROWS.sequences, ROWS.positions, strict=True)):
        alone, *own = append(runs[0], Rows((0, 1, 2), (position,) * 3), table, num_blocks)
        assert same_bits(alone[sequence], query[row])
        for cache, expected in zip(own, caches, strict=True):
            at = gathered(cache, table)[sequence, :, position], gathered(expected, table)[sequence, :, position]
            assert same_bits(*at)


def attend(
    run: Run,
    rows: Rows,
    queries: torch.Tensor,
    caches: tuple[torch.Tensor, torch.Tensor],
    table: torch.Tensor,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """attn_output [rows, heads, head_dim] over paged caches."""
    num_rows = len(rows.sequences)
    ins = instruction(
        "decode_attention",
        row_mask=torch.ones(num_rows, dtype=torch.int32),
        query=queries,
        k_cache=caches[0],
        v_cache=caches[1],
        block_table=table,
        attn_partials=torch.full((num_rows, HEADS, POSITIONS // SPLIT + 1, HEAD_DIM + 2), float("nan")),
        attn_output=torch.full((num_rows, HEADS, HEAD_DIM), float("nan")),
        scaling=HEAD_DIM**-0.5,
        softcap=softcap,
        sliding_window=window,
        kv_split_size=SPLIT,
        **rows.tensors(),
    )
    if run is run_natively:
        run_natively(ins, caches[0].dtype)
    else:
        run(ins)
    return ins.tensors["attn_output"]


def contiguous_attention(
    rows: Rows, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, window: int
) -> torch.Tensor:
    """What PyTorch makes of each row over keys and values [sequences, kv_heads, positions, head_dim]."""
    outputs = []
    for query, sequence, position in zip(queries, rows.sequences, rows.positions, strict=True):
        begin, end = max(0, position + 1 - window) if window else 0, position + 1
        seen = (cache[sequence, :, begin:end].float()[None] for cache in (keys, values))
        outputs.append(F.scaled_dot_product_attention(query[None, :, None], *seen, enable_gqa=True)[0, :, 0])
    return torch.stack(outputs)


def cached(dtype: torch.dtype = torch.float32, num_sequences: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [sequences, kv_heads, positions, head_dim]."""
    shape = num_sequences, KV_HEADS, POSITIONS, HEAD_DIM
    return random(*shape, seed=4, dtype=dtype), random(*shape, seed=5, dtype=dtype)


@both
def test_nan_stays_nan_under_a_soft_cap(runs: tuple[Run, Run]) -> None:
    keys, values = cached(torch.float32)
    queries = random(len(ROWS.sequences), HEADS, HEAD_DIM, seed=6)
    queries[1] = float("nan")
    table, num_blocks = scattered(16, ROWS.num_sequences)
    caches = paged(keys, table, num_blocks), paged(values, table, num_blocks)
    rows = attend(runs[1], ROWS, queries, caches, table, softcap=5.0).isnan().flatten(1)
    assert rows[1].all()
    assert not rows[[row for row in range(len(rows)) if row != 1]].any()


@both
@pytest.mark.parametrize("window", [0, 1, 20, 64, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_reads_blocks_as_if_they_lay_in_order(runs: tuple[Run, Run], dtype: torch.dtype, window: int) -> None:
    """Bit by bit the same for every block size, and what PyTorch computes."""
    keys, values = cached(dtype)
    for cache in (keys, values):  # what no row may see
        cache[0, :, 101:] = cache[1, :, 2:] = cache[2, :, 65:] = float("nan")
    queries = random(len(ROWS.sequences), HEADS, HEAD_DIM, seed=6)
    expected = contiguous_attention(ROWS, queries, keys, values, window)
    rounds = runs[1] is run_natively and dtype == torch.bfloat16 and _C.usable_isas()[0] == "avx512_bf16"
    found = []
    for block_size in (CONTIGUOUS, 16, 32, 64):
        table, num_blocks = scattered(block_size, 3)
        caches = paged(keys, table, num_blocks), paged(values, table, num_blocks)
        found.append(attend(runs[1], ROWS, queries, caches, table, window))
        assert_close(found[-1], expected, "bf16 activations" if rounds else "fp32", f"blocks of {block_size}")
        assert same_bits(found[-1], found[0]), f"blocks of {block_size}"


@both
def test_positions_that_have_no_block_are_not_looked_up(runs: tuple[Run, Run]) -> None:
    """Behind a row's own position the table holds -1, and so it does for what a sliding window has left behind."""
    keys, values = cached()
    queries = random(len(ROWS.sequences), HEADS, HEAD_DIM, seed=6)
    table, num_blocks = scattered(16, 3)
    caches = paged(keys, table, num_blocks), paged(values, table, num_blocks)
    for window in (0, 20):
        expected = attend(runs[1], ROWS, queries, caches, table, window)
        holes = table.clone()
        holes[0, 101 // 16 + 1 :] = holes[1, 1:] = holes[2, 64 // 16 + 1 :] = -1
        if window:
            holes[0, : (98 - 19) // 16] = holes[2, : (63 - 19) // 16] = -1
        assert (holes < 0).any(dim=1).all()
        assert same_bits(attend(runs[1], ROWS, queries, caches, holes, window), expected)


@both
@pytest.mark.parametrize("block_size", [16, 32])
def test_sequences_may_share_blocks(runs: tuple[Run, Run], block_size: int) -> None:
    """Two sequences with a prefix in common, which is cached once: what they see is what they would see of copies."""
    shared = 64
    keys, values = cached(num_sequences=2)
    for cache in (keys, values):
        cache[1, :, :shared] = cache[0, :, :shared]
    rows = Rows(sequences=(0, 1, 1, 0), positions=(110, 80, shared - 1, 109))
    queries = random(4, HEADS, HEAD_DIM, seed=6)
    table, num_blocks = scattered(block_size, 2)
    own = attend(runs[1], rows, queries, (paged(keys, table, num_blocks), paged(values, table, num_blocks)), table)
    left_out = table[1, : shared // block_size].clone().long()
    table[1, : shared // block_size] = table[0, : shared // block_size]
    caches = paged(keys, table, num_blocks), paged(values, table, num_blocks)
    assert all(cache[left_out].isnan().all() for cache in caches)
    assert same_bits(attend(runs[1], rows, queries, caches, table), own)
    assert_close(own, contiguous_attention(rows, queries, keys, values, 0), "fp32")


@both
def test_rows_of_one_sequence_see_no_further_than_their_own_position(runs: tuple[Run, Run]) -> None:
    """A chunk of prompt rows in one step gives each what it gets as the only one, bit by bit: later positions are there
    already, but not for it."""
    keys, values = cached(num_sequences=1)
    positions = (90, *range(58, 90))  # the decode row, and 32 prompt rows across blocks and splits
    rows = Rows((0,) * len(positions), positions)
    queries = random(len(positions), HEADS, HEAD_DIM, seed=6)
    table, num_blocks = scattered(16, 1)
    caches = paged(keys, table, num_blocks), paged(values, table, num_blocks)
    together = attend(runs[1], rows, queries, caches, table)
    for row, position in enumerate(positions):
        until = (cache.clone() for cache in (keys, values))
        keys_until, values_until = until
        keys_until[:, :, position + 1 :] = values_until[:, :, position + 1 :] = float("nan")
        caches = paged(keys_until, table, num_blocks), paged(values_until, table, num_blocks)
        alone = attend(runs[1], Rows((0,), (position,)), queries[row : row + 1], caches, table)
        assert same_bits(alone[0], together[row]), f"position {position}"
