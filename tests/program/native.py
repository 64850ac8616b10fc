"""One instruction on the native executor, without a model around it."""

from types import SimpleNamespace
from typing import cast

import torch

from skipkernels.executors.cpu import CpuExecutor
from skipkernels.program.state import DecodeState
from skipkernels.program.table import Instruction


def run_natively(ins: Instruction, dtype: torch.dtype = torch.float32) -> None:
    state = SimpleNamespace(active=ins.row_mask, k_cache=torch.zeros(1, dtype=dtype), num_rows=ins.row_mask.numel())
    CpuExecutor((ins,), cast(DecodeState, state), num_threads=1).run_instruction(0)
