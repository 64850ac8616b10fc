"""An instruction that multiplies every number of eight bits (e4m3)."""

from __future__ import annotations

import torch

from skipkernels.model.float8_blocks import float8_blocks
from skipkernels.model.matrix import Matrix
from skipkernels.program.table import Instruction, instruction
from tests.executors.programs import guarded
from tests.matrices import every_number

_SCALE = 0.375


def all_numbers(rows: int) -> tuple[Instruction, torch.Tensor]:
    """A down_proj with one number a row, in every column one, and zeros beside it; exactly what it adds."""
    bits = torch.zeros(256, 128, dtype=torch.uint8)
    bits[torch.arange(256), torch.arange(256) % 128] = every_number()
    blocks = float8_blocks(bits.view(torch.float8_e4m3fn), torch.full((256, 1), _SCALE))
    ins = instruction(
        "down_proj_add",
        row_mask=torch.ones(rows, dtype=torch.int32),
        activations="fp32",
        intermediate=guarded(torch.ones(rows, 128)),
        down_proj=Matrix("f8_e4m3", 256, 128, blocks).arranged("planes"),
        hidden_states=torch.zeros(rows, 256),
        similarity_partials=None,
        rows_per_partial=16,
    )
    return ins, (every_number().view(torch.float8_e4m3fn).float() * _SCALE).expand(rows, -1)
