"""What advance leaves behind, written out by hand, in the reference and in native code."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from skipkernels.program.reference import advance
from skipkernels.program.state import DECODING, ENDED, WAITS_FOR_BLOCK
from skipkernels.program.table import Instruction, instruction
from tests.program.native import run_natively

SEQUENCES, LAYERS, MAX_SEQ_LEN, BLOCK_SIZE, VOCAB = 3, 2, 8, 4, 10
RUNS = pytest.mark.parametrize("run", [advance, run_natively], ids=["reference", "native"])
Run = Callable[[Instruction], None]


def ending(**changes: Any) -> Instruction:
    """Sequences 0 and 1 are active, at positions 3 and 5, in the middle of a span of skips; sequence 2 is idle. Behind
    their decode rows stand an active prompt row and an idle one."""
    i32 = torch.int32
    tensors = {
        "next_token": torch.tensor([4, 7, 9], dtype=i32),
        "eos_token_ids": torch.full((SEQUENCES, 2), -1, dtype=i32),
        "max_new_tokens": torch.full((SEQUENCES,), 100, dtype=i32),
        "block_table": torch.tensor([[4, 0], [2, 5], [3, 1]], dtype=i32),
        "input_ids": torch.full((SEQUENCES + 2,), -5, dtype=i32),
        "token_ids": torch.full((SEQUENCES, MAX_SEQ_LEN + 1), -5, dtype=i32),
        "seen": torch.zeros(SEQUENCES, VOCAB, dtype=torch.uint8),
        "row_position": torch.tensor([3, 5, 6, 2, 1], dtype=i32),
        "num_generated": torch.tensor([1, 2, 3], dtype=i32),
        "active": torch.tensor([1, 1, 0, 1, 0], dtype=i32),
        "skip_remaining": torch.tensor([7, 8, 9], dtype=i32),
        "run_ffn": torch.tensor([[1, 0, 5, 0, 6], [0, 1, 5, 1, 6]], dtype=i32),
        "similarity": torch.tensor([[0.5, math.nan, 0.7], [math.nan, 0.25, 0.7]]),
        "run_map": torch.full((SEQUENCES, MAX_SEQ_LEN, LAYERS), 77, dtype=torch.uint8),
        "similarity_map": torch.full((SEQUENCES, MAX_SEQ_LEN, LAYERS), -7.0),
        "progress": torch.full((SEQUENCES, 2), -7, dtype=i32),
    }
    for name, value in changes.items():
        tensors[name] = torch.tensor(value, dtype=tensors[name].dtype)
    return instruction("advance", row_mask=tensors["active"], block_size=BLOCK_SIZE, **tensors)


@RUNS
def test_the_token_is_appended_and_the_row_moves_on(run: Run) -> None:
    t = (ins := ending()).tensors
    run(ins)
    assert t["row_position"].tolist() == [4, 6, 6, 2, 1]
    assert t["num_generated"].tolist() == [2, 3, 3]
    assert t["input_ids"].tolist() == [4, 7, -5, -5, -5]
    assert t["progress"].tolist() == [[2, DECODING], [3, DECODING], [-7, -7]]
    assert t["token_ids"].tolist() == [[-5] * 4 + [4] + [-5] * 4, [-5] * 6 + [7] + [-5] * 2, [-5] * 9]
    assert [row.nonzero().flatten().tolist() for row in t["seen"]] == [[4], [7], []]


@RUNS
def test_what_ran_is_recorded_under_the_token(run: Run) -> None:
    t = (ins := ending()).tensors
    run(ins)
    assert t["run_map"][0, 1].tolist() == [1, 0]
    assert t["run_map"][1, 2].tolist() == [0, 1]
    assert (t["run_map"] != 77).sum() == 4
    assert t["similarity_map"][0, 1].tolist() == pytest.approx([0.5, math.nan], nan_ok=True)
    assert t["similarity_map"][1, 2].tolist() == pytest.approx([math.nan, 0.25], nan_ok=True)
    assert (t["similarity_map"] != -7.0).sum() == 4


@RUNS
def test_the_next_step_starts_afresh(run: Run) -> None:
    t = (ins := ending()).tensors
    run(ins)
    assert t["active"][:SEQUENCES].tolist() == [1, 1, 0]
    assert t["run_ffn"][:, :SEQUENCES].tolist() == [[1, 1, 5], [1, 1, 5]]
    assert t["skip_remaining"].tolist() == [0, 0, 9]
    assert t["similarity"].isnan().tolist() == [[True, True, False]] * 2


@RUNS
@pytest.mark.parametrize("decode_rows", [[1, 1, 0], [0, 0, 0]], ids=["with decode rows", "alone"])
def test_prompt_rows_live_for_one_step(run: Run, decode_rows: list[int]) -> None:
    """Also in a step that has no decode row."""
    before = ending()
    t = (ins := ending(active=[*decode_rows, 1, 0])).tensors
    run(ins)
    assert t["active"].tolist() == [*decode_rows, 0, 0]
    assert t["run_ffn"][:, SEQUENCES:].tolist() == [[0, 6], [0, 6]]
    if not any(decode_rows):
        changed = [
            name
            for name, tensor in t.items()
            if not torch.equal(tensor.nan_to_num(), before.tensors[name].nan_to_num())
        ]
        assert changed == ["active", "run_ffn"]


@RUNS
@pytest.mark.parametrize(
    ("changes", "active"),
    [
        ({"eos_token_ids": [[4, -1], [4, -1], [9, -1]]}, [0, 1, 0]),
        ({"eos_token_ids": [[3, 4], [-1, 7], [-1, -1]]}, [0, 0, 0]),
        ({"max_new_tokens": [2, 4, 1]}, [0, 1, 0]),
        ({"max_new_tokens": [3, 3, 9]}, [1, 0, 0]),
        ({"row_position": [7, 6, 7, 2, 1]}, [0, 1, 0]),  # it has all the positions a sequence may have
    ],
)
@pytest.mark.parametrize("blocks", [[[4, 0], [2, 5], [3, 1]], None], ids=["with blocks", "without"])
def test_a_row_ends_with_an_eos_token_its_length_or_the_cache(
    run: Run, blocks: list[list[int]] | None, changes: dict, active: list[int]
) -> None:
    """A row that ends waits for no block."""
    if blocks is None:  # for rows that end; those that go on keep theirs
        blocks = [[4, 0] if goes_on else [4, -1] for goes_on in active]
    t = (ins := ending(block_table=blocks, **changes)).tensors
    run(ins)
    assert t["active"][:SEQUENCES].tolist() == active
    assert t["progress"][:2, 1].tolist() == [DECODING if goes_on else ENDED for goes_on in active[:2]]
    assert t["run_ffn"][:, :SEQUENCES].tolist() == [[active[0], active[1], 5]] * LAYERS
    assert t["num_generated"].tolist() == [2, 3, 3]


@RUNS
def test_a_row_waits_where_its_next_position_has_no_block(run: Run) -> None:
    """Position 4 lies in a sequence's second block. All is done as if the row went on, but it rests."""
    t = (ins := ending(block_table=[[4, -1], [2, 5], [3, 1]])).tensors
    run(ins)
    goes_on = (other := ending()).tensors
    run(other)
    assert t["active"].tolist() == [0, 1, 0, 0, 0]
    assert t["run_ffn"].tolist() == [[0, 1, 5, 0, 6]] * LAYERS
    assert t["progress"].tolist() == [[2, WAITS_FOR_BLOCK], [3, DECODING], [-7, -7]]
    for name, tensor in t.items():
        if name not in ("active", "run_ffn", "progress", "block_table"):
            assert torch.equal(tensor.nan_to_num(), goes_on[name].nan_to_num()), name


@RUNS
def test_a_row_waits_for_no_block_that_it_does_not_need_yet(run: Run) -> None:
    t = (ins := ending(row_position=[2, 5, 6, 2, 1], block_table=[[4, -1], [2, 5], [-1, -1]])).tensors
    run(ins)
    assert t["active"][:SEQUENCES].tolist() == [1, 1, 0]
    assert t["progress"].tolist() == [[2, DECODING], [3, DECODING], [-7, -7]]


@RUNS
def test_a_row_goes_on_once_it_has_its_block(run: Run) -> None:
    t = (ins := ending(block_table=[[4, -1], [2, 5], [3, 1]])).tensors
    run(ins)
    t["block_table"][0, 1] = 0
    t["active"][0] = 1  # what DecodeState.start_decoding does
    t["run_ffn"][:, 0] = 1
    t["next_token"][0] = 6
    run(ins)
    assert t["row_position"][:SEQUENCES].tolist() == [5, 7, 6]
    assert t["active"][:SEQUENCES].tolist() == [1, 1, 0]
    assert t["progress"][0].tolist() == [3, DECODING]
    assert t["token_ids"][0].tolist() == [-5] * 4 + [4, 6] + [-5] * 3
    assert t["run_map"][0, 1:3].tolist() == [[1, 0], [1, 1]]
