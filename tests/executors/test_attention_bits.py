"""A row's attention on the CPU has the bits it has alone, in blocks of any size, beside few rows and many."""

import pytest
import torch

from skipkernels import _C
from skipkernels.program.reference import decode_attention
from skipkernels.program.table import Instruction
from tests.executors.attention_case import AttentionCase
from tests.executors.native_rows import run
from tests.executors.programs import same_bits
from tests.tolerances import assert_close

DECODING = ((0, 599), (1, 256), (0, 255), (1, 0))
PROMPT = tuple((2, position) for position in range(501, 531))
"""30 rows of one sequence: more queries than are multiplied with keys and values as they lie in the cache."""
SHAPES = {"three heads of three": (9, 3, 64), "one head of eight": (8, 1, 80), "heads of their own": (5, 5, 48)}


def output(ins: Instruction, dtype: torch.dtype, isa: str) -> torch.Tensor:
    run(ins, dtype, isa)
    return ins.tensors["attn_output"]


@pytest.mark.parametrize("isa", _C.usable_isas())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sliding_window", [0, 77])
def test_bits_do_not_depend_on_blocks_or_on_other_rows(
    isa: str, dtype: torch.dtype, shape: str, sliding_window: int
) -> None:
    case = AttentionCase(DECODING + PROMPT, 600, *SHAPES[shape], kv_split_size=256, dtype=dtype)
    everyone = list(range(len(case.rows)))
    expected = output(case.instruction(32, everyone, sliding_window), dtype, isa)
    reference = case.instruction(32, everyone, sliding_window)
    decode_attention(reference)
    assert_close(expected, reference.tensors["attn_output"], "bf16 activations" if dtype == torch.bfloat16 else "fp32")
    for block_size, active in ((5, everyone), (16, [0]), (32, [1, 2, 3]), (32, [10]), (7, [20, 21]), (64, [4, 5, 30])):
        actual = output(case.instruction(block_size, active, sliding_window), dtype, isa)
        assert same_bits(actual[active], expected[active]), f"blocks of {block_size}, rows {active}"
