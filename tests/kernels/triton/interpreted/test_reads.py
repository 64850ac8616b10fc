"""What the kernels read: every weight once for the whole batch, nothing of a skipped FFN, nothing of other rows."""

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from skipkernels.kernels.triton import TRITON
from skipkernels.program.state import DecodeState
from skipkernels.program.table import Instruction
from tests.kernels.triton.interpreted.test_programs import plain_case

MATRICES = {
    "qkv_rope_append": "qkv_proj",
    "o_proj_add": "o_proj",
    "gate_up_silu": "gate_up_proj",
    "down_proj_add": "down_proj",
    "lm_head": "lm_head",
}


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The addresses of the elements that kernels load, as the interpreter passes them to memory."""
    load, seen = interpreter._interpreter.load, []

    def recording(pointers: np.ndarray, mask: np.ndarray, other: np.ndarray, dtype: np.dtype) -> np.ndarray:
        seen.append(pointers[mask].ravel())
        return load(pointers, mask, other, dtype)

    monkeypatch.setattr(interpreter._interpreter, "load", recording)
    return seen


def reads_of(tensor: torch.Tensor, addresses: list[np.ndarray]) -> np.ndarray:
    """How often each element of a contiguous tensor was read."""
    offsets = np.concatenate(addresses).astype(np.int64) - tensor.data_ptr()
    offsets = offsets[(offsets >= 0) & (offsets < tensor.nbytes)]
    return np.bincount(offsets // tensor.element_size(), minlength=tensor.numel())


def program(batch_size: int, active: tuple[bool, ...]) -> tuple[dict[str, Instruction], DecodeState]:
    case = plain_case(batch_size, torch.bfloat16, active=active, hidden_size=37, intermediate_size=21)
    state = case.state()
    return {ins.op: ins for ins in case.program(case.weights(), state)}, state


@pytest.mark.parametrize("op", MATRICES)
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_weight_is_read_once_for_the_whole_batch(op: str, batch_size: int, addresses: list[np.ndarray]) -> None:
    instructions, _ = program(batch_size, (True,) * batch_size)
    TRITON[op](instructions[op])
    assert (reads_of(instructions[op].tensors[MATRICES[op]], addresses) == 1).all()


@pytest.mark.parametrize("op", MATRICES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_where_no_row_is_wanted_nothing_is_read_but_the_flags(
    op: str, batch_size: int, addresses: list[np.ndarray]
) -> None:
    instructions, _ = program(batch_size, (True,) * batch_size)
    instructions[op].when.zero_()
    TRITON[op](instructions[op])
    flags = reads_of(instructions[op].when, addresses)
    assert flags.all()
    assert flags.sum() == sum(len(read) for read in addresses)


@pytest.mark.parametrize("op", [op for op in TRITON if op != "skip_gate"])
def test_nothing_of_other_rows_is_read(op: str, addresses: list[np.ndarray]) -> None:
    instructions, state = program(3, (True, False, True))
    TRITON[op](instructions[op])
    for name, buffer in state.buffers():
        if buffer.shape[0] == 3 and name != "active":
            assert not reads_of(buffer[1], addresses).any(), name
    assert not reads_of(state.k_cache[0, 1], addresses).any()
    assert not reads_of(state.v_cache[0, 1], addresses).any()
