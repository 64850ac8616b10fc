"""Experts in blocks in the C++ kernels: as the reference multiplies them on every instruction set, and a
row as it is alone."""

from typing import Any

import pytest
import torch

from skipkernels import _C
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.model.matrix import GGUF_FORMATS, Matrix
from skipkernels.program.reference import REFERENCE
from skipkernels.program.table import Instruction, instruction
from tests.executors.native_rows import Rows
from tests.executors.programs import guarded, same_bits
from tests.matrices import random_matrix
from tests.tolerances import assert_close

ISAS = pytest.mark.parametrize("isa", _C.usable_isas())
FORMATS = pytest.mark.parametrize("format", GGUF_FORMATS)
EXPERTS, CHOSEN, ROWS = 5, 2, 20


def chosen_experts(rows: int) -> dict[str, torch.Tensor]:
    """Choices of ``rows`` rows as route_experts lists them; expert 3 is chosen by nobody."""
    pairs: list[list[int]] = [[] for _ in range(EXPERTS)]
    for row in range(rows):
        for choice in range(CHOSEN):
            pairs[(0, 1, 2, 4)[(3 * row + choice) % 4]].append(row * CHOSEN + choice)
    counts = torch.tensor([0, *map(len, pairs)])
    listed = [pair for of_expert in pairs for pair in of_expert]
    return {"expert_begins": counts.cumsum(0).int(), "expert_pairs": torch.tensor(listed).int()}


def gate_up(matrix: Matrix, rows: int) -> tuple[Instruction, torch.Tensor]:
    x = torch.randn(ROWS, matrix.columns, generator=torch.Generator().manual_seed(1))[:rows]
    out = torch.zeros(rows, CHOSEN, matrix.rows // EXPERTS // 2)
    ins = instruction(
        "experts_gate_up_act",
        row_mask=torch.ones(rows, dtype=torch.int32),
        hidden_states=guarded(x),
        post_attention_layernorm=torch.linspace(0.5, 1.5, matrix.columns),
        gate_up_proj=matrix,
        expert_intermediate=out,
        rms_norm_eps=1e-5,
        activation=0,
        layer=0,
        **chosen_experts(rows),
    )
    return ins, out


def down(matrix: Matrix, rows: int) -> tuple[Instruction, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(ROWS, matrix.rows // EXPERTS, generator=generator)[:rows].clone()
    partials = torch.zeros(-(-hidden.shape[1] // 24), rows, 3)
    ins = instruction(
        "experts_down_proj_add",
        row_mask=torch.ones(rows, dtype=torch.int32),
        expert_intermediate=torch.randn(ROWS, CHOSEN, matrix.columns, generator=generator)[:rows].contiguous(),
        expert_weights=torch.rand(ROWS, CHOSEN, generator=generator)[:rows].contiguous(),
        down_proj=matrix,
        hidden_states=hidden,
        similarity_partials=partials,
        rows_per_partial=24,
        **chosen_experts(rows),
    )
    return ins, hidden


OPS = pytest.mark.parametrize(("op", "height"), [(gate_up, 2 * 75), (down, 77)], ids=["gate_up", "down"])


def run(op: Any, matrix: Matrix, rows: int, isa: str, num_threads: int = 2) -> torch.Tensor:
    ins, out = op(matrix.interleaved(), rows)
    executor = CpuExecutor((ins,), Rows(ins.row_mask, torch.float32), num_threads=num_threads, isa=isa)  # type: ignore[arg-type]
    executor.run_instruction(0)
    return torch.cat([out.flatten(), *([] if op is gate_up else [ins.tensors["similarity_partials"].flatten()])])


def poisoned(matrix: Matrix, height: int) -> Matrix:
    """Whose expert 3 has scales that are no numbers: nobody may read it."""
    data = matrix.data.clone()
    data[3 * height : 4 * height] = 255
    return Matrix(matrix.format, matrix.rows, matrix.columns, data)


@ISAS
@FORMATS
@OPS
@pytest.mark.parametrize("rows", [1, ROWS])
def test_products_of_experts_are_the_reference_s(isa: str, format: str, op: Any, height: int, rows: int) -> None:
    """Of heights that are no whole number of groups: an expert begins within a group."""
    matrix = random_matrix(format, EXPERTS * height, 512, seed=height, scale=0.001)
    ins, expected = op(matrix, rows)
    REFERENCE[ins.op](ins)
    actual = run(op, matrix, rows, isa)
    assert_close(actual[: expected.numel()], expected.flatten(), "int8 activations")
    assert same_bits(run(op, poisoned(matrix, height), rows, isa), actual)


@ISAS
@pytest.mark.parametrize("format", ["q4_0", "q6_k"])
@OPS
def test_a_row_alone_gets_the_bits_it_gets_among_others(isa: str, format: str, op: Any, height: int) -> None:
    """Its neighbours choose other experts, and the same ones."""
    matrix = random_matrix(format, EXPERTS * height, 512, seed=height, scale=0.001)
    size = (CHOSEN if op is gate_up else 1) * (height // 2 if op is gate_up else height)
    together = run(op, matrix, ROWS, isa, num_threads=3)
    assert same_bits(run(op, matrix, 1, isa, num_threads=1)[:size], together[:size])
    assert same_bits(run(op, matrix, 9, isa)[: 9 * size], together[: 9 * size])
