"""One instruction on the CPU, over as many rows as its row_mask has."""

import torch

from skipkernels.executors.cpu import CpuExecutor
from skipkernels.program.state import DecodeState
from skipkernels.program.table import Instruction


class Rows:
    """As much of a state as one instruction over ``rows`` needs."""

    def __init__(self, row_mask: torch.Tensor, dtype: torch.dtype) -> None:
        self.active = row_mask
        self.k_cache = torch.zeros(1, dtype=dtype)
        self.num_rows = self.num_sequences = row_mask.numel()


def run(ins: Instruction, dtype: torch.dtype, isa: str, num_threads: int = 2) -> None:
    state: DecodeState = Rows(ins.row_mask, dtype)  # type: ignore[assignment]
    CpuExecutor((ins,), state, num_threads=num_threads, isa=isa).run_instruction(0)
