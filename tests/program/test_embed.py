"""Which embedding a row gets: its token's, or one that came with the prompt. By hand, in the reference and natively."""

from collections.abc import Callable

import pytest
import torch

from skipkernels.program.reference import embed
from skipkernels.program.table import Instruction, instruction
from tests.program.native import run_natively

RUNS = pytest.mark.parametrize("run", [embed, run_natively], ids=["reference", "native"])
Run = Callable[[Instruction], None]
HIDDEN = 5


def embedding(input_ids: list[int], row_mask: list[int], prompt_rows: int, scale: float = 1.0) -> Instruction:
    """Channel c of token n is 100 n + c, that of prompt row n's embedding -100 n - c - 1; a hidden state is -7."""
    channels = torch.arange(HIDDEN)
    return instruction(
        "embed",
        row_mask=torch.tensor(row_mask, dtype=torch.int32),
        hidden_states=torch.full((len(row_mask), HIDDEN), -7.0),
        embed_tokens=torch.arange(4)[:, None] * 100.0 + channels,
        input_ids=torch.tensor(input_ids, dtype=torch.int32),
        prompt_embeddings=-1.0 - (torch.arange(prompt_rows)[:, None] * 100.0 + channels),
        scale=scale,
    )


@RUNS
def test_decode_rows_and_prompt_rows_get_their_tokens_embedding(run: Run) -> None:
    ins = embedding([3, 0, 1, 2, 3], [1, 1, 1, 1, 1], prompt_rows=3)
    run(ins)
    assert ins.tensors["hidden_states"][:, 0].tolist() == [300, 0, 100, 200, 300]
    assert ins.tensors["hidden_states"][0].tolist() == [300, 301, 302, 303, 304]


@RUNS
def test_a_prompt_row_without_a_token_gets_its_own_embedding(run: Run) -> None:
    """It stands at the row's number among the prompt rows: those before it, with tokens or idle, count."""
    ins = embedding([3, 0, -1, 2, 1, -1], [1, 1, 1, 1, 0, 1], prompt_rows=4)
    run(ins)
    assert ins.tensors["hidden_states"][:, 0].tolist() == [300, 0, -1, 200, -7, -301]
    assert ins.tensors["hidden_states"][5].tolist() == [-301, -302, -303, -304, -305]


@RUNS
def test_an_idle_row_is_left_alone(run: Run) -> None:
    ins = embedding([3, 1, -1, 2], [0, 1, 0, 0], prompt_rows=2)
    run(ins)
    assert ins.tensors["hidden_states"][:, 0].tolist() == [-7, 100, -7, -7]


@RUNS
def test_a_step_may_have_no_prompt_rows(run: Run) -> None:
    ins = embedding([2, 1], [1, 1], prompt_rows=0)
    run(ins)
    assert ins.tensors["hidden_states"][:, 0].tolist() == [200, 100]


@RUNS
def test_the_scale_is_for_tokens_alone(run: Run) -> None:
    ins = embedding([3, -1, 2], [1, 1, 1], prompt_rows=2, scale=2.0)
    run(ins)
    assert ins.tensors["hidden_states"][:, 1].tolist() == [602, -2, 402]
