"""advance leaves behind what the reference does, in every way a sequence can end or rest."""

import math
from typing import Any

import pytest
import torch

from skipkernels.kernels.triton import TRITON
from skipkernels.program.reference import advance
from skipkernels.program.state import DECODING, ENDED, WAITS_FOR_BLOCK
from skipkernels.program.table import Instruction, instruction
from tests.executors.programs import same_bits

SEQUENCES, PROMPT_ROWS, LAYERS, MAX_SEQ_LEN, VOCAB, BLOCK_SIZE = 3, 2, 3, 8, 10, 4


def step(**changes: Any) -> Instruction:
    """Sequences 0 and 1 at positions 3 and 5 and both prompt rows are active, sequence 2 is idle."""
    i32, rows = torch.int32, SEQUENCES + PROMPT_ROWS
    tensors = {
        "next_token": torch.tensor([4, 7, 9], dtype=i32),
        "eos_token_ids": torch.full((SEQUENCES, 2), -1, dtype=i32),
        "max_new_tokens": torch.full((SEQUENCES,), 100, dtype=i32),
        "block_table": torch.tensor([[5, 6], [1, 0], [-1, -1]], dtype=i32),
        "input_ids": torch.full((rows,), -5, dtype=i32),
        "token_ids": torch.full((SEQUENCES, MAX_SEQ_LEN + 1), -5, dtype=i32),
        "seen": torch.zeros(SEQUENCES, VOCAB, dtype=torch.uint8),
        "row_position": torch.tensor([3, 5, 6, 1, 2], dtype=i32),
        "num_generated": torch.tensor([1, 2, 3], dtype=i32),
        "active": torch.tensor([1, 1, 0, 1, 1], dtype=i32),
        "skip_remaining": torch.tensor([7, 8, 9], dtype=i32),
        "run_ffn": torch.tensor([[1, 0, 5, 1, 0], [0, 1, 5, 1, 1], [1, 1, 5, 0, 1]], dtype=i32),
        "similarity": torch.tensor([[0.5, math.nan, 0.7], [math.nan, 0.25, 0.7], [0.125, 1.0, 0.7]]),
        "run_map": torch.full((SEQUENCES, MAX_SEQ_LEN, LAYERS), 77, dtype=torch.uint8),
        "similarity_map": torch.full((SEQUENCES, MAX_SEQ_LEN, LAYERS), -7.0),
        "progress": torch.full((SEQUENCES, 2), -7, dtype=i32),
    }
    for name, value in changes.items():
        tensors[name] = torch.tensor(value, dtype=tensors[name].dtype)
    return instruction("advance", row_mask=tensors["active"], block_size=BLOCK_SIZE, **tensors)


@pytest.mark.parametrize(
    ("changes", "becomes"),
    [
        ({}, [DECODING, DECODING]),
        ({"eos_token_ids": [[-1, 4], [9, 9], [9, 9]]}, [ENDED, DECODING]),
        ({"max_new_tokens": [2, 4, 1]}, [ENDED, DECODING]),
        ({"row_position": [6, 7, 6, 1, 2]}, [DECODING, ENDED]),  # no position is left
        ({"row_position": [2, 4, 6, 1, 2], "next_token": [0, 9, 3]}, [DECODING, DECODING]),
        ({"block_table": [[5, -1], [1, 0], [-1, -1]]}, [WAITS_FOR_BLOCK, DECODING]),
        ({"block_table": [[5, -1], [1, -1], [-1, -1]], "max_new_tokens": [2, 9, 9]}, [ENDED, WAITS_FOR_BLOCK]),
        ({"row_position": [2, 7, 6, 1, 2], "block_table": [[5, -1], [1, -1], [-1, -1]]}, [DECODING, ENDED]),
        ({"active": [0, 0, 0, 1, 0]}, [-7, -7]),
        ({"active": [1, 0, 0, 0, 0]}, [DECODING, -7]),
    ],
)
def test_every_buffer_agrees(changes: dict[str, Any], becomes: list[int]) -> None:
    actual, expected = step(**changes), step(**changes)
    TRITON["advance"](actual)
    advance(expected)
    for name, tensor in actual.tensors.items():
        assert same_bits(tensor, expected.tensors[name]), f"{name}: {tensor} and {expected.tensors[name]}"
    assert actual.tensors["progress"][:, 1].tolist() == [*becomes, -7]
