"""What advance leaves behind, written out by hand, in the reference and in native code."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from skipkernels.program.reference import advance
from skipkernels.program.table import Instruction, instruction
from tests.program.native import run_natively

ROWS, LAYERS, MAX_SEQ_LEN, VOCAB = 3, 2, 8, 10
RUNS = pytest.mark.parametrize("run", [advance, run_natively], ids=["reference", "native"])
Run = Callable[[Instruction], None]


def ending(**changes: Any) -> Instruction:
    """Rows 0 and 1 are active, at positions 3 and 5, in the middle of a span of skips; row 2 is idle."""
    i32 = torch.int32
    tensors = {
        "next_token": torch.tensor([4, 7, 9], dtype=i32),
        "eos_token_ids": torch.full((ROWS, 2), -1, dtype=i32),
        "max_new_tokens": torch.full((ROWS,), 100, dtype=i32),
        "input_ids": torch.full((ROWS,), -5, dtype=i32),
        "token_ids": torch.full((ROWS, MAX_SEQ_LEN + 1), -5, dtype=i32),
        "seen": torch.zeros(ROWS, VOCAB, dtype=torch.uint8),
        "seq_len": torch.tensor([3, 5, 6], dtype=i32),
        "generated": torch.tensor([1, 2, 3], dtype=i32),
        "active": torch.tensor([1, 1, 0], dtype=i32),
        "skip_remaining": torch.tensor([7, 8, 9], dtype=i32),
        "run_ffn": torch.tensor([[1, 0, 5], [0, 1, 5]], dtype=i32),
        "similarity": torch.tensor([[0.5, math.nan, 0.7], [math.nan, 0.25, 0.7]]),
        "run_map": torch.full((ROWS, MAX_SEQ_LEN, LAYERS), 77, dtype=torch.uint8),
        "similarity_map": torch.full((ROWS, MAX_SEQ_LEN, LAYERS), -7.0),
        "progress": torch.full((ROWS, 2), -7, dtype=i32),
    }
    for name, value in changes.items():
        tensors[name] = torch.tensor(value, dtype=tensors[name].dtype)
    return instruction("advance", when=tensors["active"], **tensors)


@RUNS
def test_the_token_is_appended_and_the_row_moves_on(run: Run) -> None:
    t = (ins := ending()).tensors
    run(ins)
    assert t["seq_len"].tolist() == [4, 6, 6]
    assert t["generated"].tolist() == [2, 3, 3]
    assert t["input_ids"].tolist() == [4, 7, -5]
    assert t["progress"].tolist() == [[2, 1], [3, 1], [-7, -7]]
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
    assert t["active"].tolist() == [1, 1, 0]
    assert t["run_ffn"].tolist() == [[1, 1, 5], [1, 1, 5]]
    assert t["skip_remaining"].tolist() == [0, 0, 9]
    assert t["similarity"].isnan().tolist() == [[True, True, False]] * 2


@RUNS
@pytest.mark.parametrize(
    ("changes", "active"),
    [
        ({"eos_token_ids": [[4, -1], [4, -1], [9, -1]]}, [0, 1, 0]),
        ({"eos_token_ids": [[3, 4], [-1, 7], [-1, -1]]}, [0, 0, 0]),
        ({"max_new_tokens": [2, 4, 1]}, [0, 1, 0]),
        ({"max_new_tokens": [3, 3, 9]}, [1, 0, 0]),
        ({"seq_len": [7, 6, 7]}, [0, 1, 0]),  # the cache is full
    ],
)
def test_a_row_ends_with_an_eos_token_its_length_or_the_cache(run: Run, changes: dict, active: list[int]) -> None:
    t = (ins := ending(**changes)).tensors
    run(ins)
    assert t["active"].tolist() == active
    assert t["progress"][:2, 1].tolist() == active[:2]
    assert t["run_ffn"].tolist() == [[active[0], active[1], 5]] * LAYERS
    assert t["generated"].tolist() == [2, 3, 3]
