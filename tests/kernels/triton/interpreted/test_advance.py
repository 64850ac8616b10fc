"""advance leaves behind what the reference does, in every way a row can end."""

from typing import Any

import pytest

from skipkernels.kernels.triton import TRITON
from skipkernels.program.reference import advance
from tests.executors.programs import same_bits
from tests.program.test_advance import ending


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eos_token_ids": [[-1, 4], [9, 9], [9, 9]]},
        {"max_new_tokens": [2, 4, 1]},
        {"seq_len": [7, 6, 6]},
        {"active": [0, 0, 0]},
        {"next_token": [0, 9, 3]},
    ],
)
def test_every_buffer_agrees(changes: dict[str, Any]) -> None:
    actual, expected = ending(**changes), ending(**changes)
    TRITON["advance"](actual)
    advance(expected)
    for name, tensor in actual.tensors.items():
        assert same_bits(tensor, expected.tensors[name]), f"{name}: {tensor} and {expected.tensors[name]}"
