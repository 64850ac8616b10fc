"""Matrices of blocks in the CUDA kernels: multiplied as the reference does with fp32 activations, under every schedule;
nothing is read where nobody wants it, and a row's bits do not depend on the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skipkernels.model.matrix import BLOCK_FORMATS, Matrix, StackedMatrix
from skipkernels.program.table import Instruction, instruction
from skipkernels.skipping.policy import DensePolicy, SkipPolicy
from tests.cuda.comparison import compare_op
from tests.cuda.kernels import HostKernels
from tests.executors.block_case import BlockCase
from tests.executors.float8_case import all_numbers
from tests.executors.programs import compare_program, guarded, same_bits
from tests.matrices import random_matrix
from tests.tolerances import assert_close

FORMATS = pytest.mark.parametrize("format", BLOCK_FORMATS)
OTHERS = {"q4_k": "q6_k", "q6_k": "q5_k", "q4_0": "q8_0", "q8_0": "q5_1", "f8_e4m3": "q8_0"}


def check(case: BlockCase, **options: int) -> None:
    compare_program(case, lambda program, state: HostKernels(program, state, **options))


@FORMATS
@pytest.mark.parametrize("rows", [1, 3, 11])  # one and two columns of tensor core tiles
def test_every_op_agrees_in_every_format(format: str, rows: int) -> None:
    lengths = tuple(5 + row % 4 for row in range(rows))
    check(BlockCase.of(format, seq_lens=lengths, qk_norm=rows == 3, qkv_bias=rows == 1), seed=rows % 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", OTHERS)
def test_v_may_have_another_format(format: str, dtype: torch.dtype) -> None:
    """Its heads are a kernel of their own, which stores into caches of every dtype."""
    case = BlockCase.of(format, OTHERS[format], seq_lens=(5, 9), qk_norm=True, dtype=dtype, up_differs=False)
    compare_op("qkv_rope_append", case)
    compare_op("lm_head", case)


@FORMATS
def test_long_rows_take_several_rounds(format: str) -> None:
    """More groups than warps, tiles than blocks, and a last group that is not full."""
    columns = 2080 if BLOCK_FORMATS[format].block_columns == 32 else 9 * 256
    case = BlockCase.of(format, seq_lens=(5, 6), intermediate_size=columns)
    compare_op("down_proj_add", case, num_sms=2, seed=3)


def test_rows_of_several_passes_agree_where_some_skip() -> None:
    """21 rows, of prompts beside sequences, in two passes over the weights."""
    policies = SkipPolicy(threshold=0.3, span=1, cold_start=0, cold_end=0, warmup_tokens=0), DensePolicy()
    lengths = {"seq_lens": (9, 12, 8, 5), "prompt_rows": (6, 8, 3, 0), "active": (True, True, True, False)}
    check(BlockCase.of("q4_1", policies=policies, num_layers=2, **lengths), num_sms=2)


def down_proj(rows: int, seed: int = 0, format: str = "q4_1") -> Instruction:
    """Into zeros, so that a row that was not wanted shows."""
    columns = 416 if BLOCK_FORMATS[format].block_columns == 32 else 512
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return instruction(
        "down_proj_add",
        row_mask=torch.ones(rows, dtype=torch.int32),
        activations="fp32",
        intermediate=guarded(x),
        down_proj=random_matrix(format, 40, columns, scale=0.001).arranged("planes"),
        hidden_states=torch.zeros(rows, 40),
        similarity_partials=None,
        rows_per_partial=16,
    )


def run(ins: Instruction, **options: int) -> torch.Tensor:
    state = type("State", (), {"k_cache": torch.zeros(1)})()
    HostKernels((ins,), state, **options).run_instruction(0)
    return ins.tensors["hidden_states"]


@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q4_1", "q5_1", "f8_e4m3"])
def test_a_row_gets_the_bits_it_gets_alone(format: str) -> None:
    """Whatever the other rows, how many there are, the blocks of the grid and the schedule."""
    together = run(down_proj(16, format=format)).clone()
    assert not (together == 0).any()
    for row, idle in ((0, range(1, 16)), (5, (4, 9)), (12, range(12))):
        ins = down_proj(16, format=format)
        ins.row_mask[list(idle)] = 0
        ins.tensors["intermediate"][list(idle)] = torch.nan
        alone = run(ins, num_sms=1 + row % 3, seed=row % 6)
        assert same_bits(alone[row], together[row])
        assert not alone[list(idle)].any()
    few = down_proj(3, format=format)  # of a program with one column of tiles
    few.tensors["intermediate"].copy_(down_proj(16, format=format).tensors["intermediate"][:3])
    assert same_bits(run(few), together[:3])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5])
@pytest.mark.parametrize("format", ["q8_0", "q4_0", "q5_1", "f8_e4m3"])
def test_the_accuracy_is_that_of_floats(format: str, scale: float) -> None:
    """Against a product in fp64 with the exact weights."""
    ins = down_proj(4, format=format)
    ins.tensors["intermediate"].mul_(scale)
    x, weights = ins.tensors["intermediate"].double(), ins.tensors["down_proj"].dequantize().double()
    error = (run(ins).double() - x @ weights.T).abs().max() / (x.abs() @ weights.abs().T).max()
    assert float(error) < 2**-22


@pytest.mark.parametrize("rows", [1, 3, 11])
def test_every_number_of_8_bits_is_multiplied(rows: int) -> None:
    ins, expected = all_numbers(rows)
    assert torch.equal(run(ins), expected)


def gate_up(gate: Matrix, up: Matrix, **changes: object) -> Instruction:
    operands = {
        "row_mask": torch.ones(2, dtype=torch.int32),
        "activations": "fp32",
        "hidden_states": guarded(torch.randn(2, 96, generator=torch.Generator().manual_seed(4))),
        "post_attention_layernorm": torch.linspace(0.5, 1.5, 96),
        "gate_up_proj": StackedMatrix((gate, up)),
        "intermediate": torch.zeros(2, 40),
        "rms_norm_eps": 1e-5,
        "activation": 0,
    }
    return instruction("gate_up_act", **{**operands, **changes})


def test_gate_and_up_may_be_two_matrices_of_one_format() -> None:
    """As where single neurons are left out. Against plain torch."""
    gate, up = (random_matrix("q4_1", 40, 96, seed=seed) for seed in (1, 2))
    ins = gate_up(gate.arranged("planes"), up.arranged("planes"))
    run(ins)
    t = ins.tensors
    x = t["hidden_states"]
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * t["post_attention_layernorm"]
    expected = torch.nn.functional.silu(x @ gate.dequantize().T) * (x @ up.dequantize().T)
    assert_close(t["intermediate"], expected, "fp32")


def test_what_has_no_kernel_is_refused_by_name() -> None:
    gate, up = random_matrix("q4_1", 40, 96), random_matrix("q8_0", 40, 96)
    with pytest.raises(ValueError, match="gate_proj in q4_1 and up_proj in q8_0 have no CUDA kernel together"):
        run(gate_up(gate.arranged("planes"), up.arranged("planes")))
    with pytest.raises(ValueError, match="gate_up_act: a matrix in q4_1 must lie in planes, got interleaved"):
        run(gate_up(gate.interleaved(), gate.interleaved()))
    listed = {"neurons": torch.zeros(40, dtype=torch.int32), "num_neurons": torch.zeros(1, dtype=torch.int32)}
    ins = gate_up(gate, gate)
    names = ("hidden_states", "post_attention_layernorm", "intermediate")
    operands = {name: ins.tensors[name] for name in names} | {"rms_norm_eps": 1e-5, "up_proj": up.arranged("planes")}
    with pytest.raises(ValueError, match="up_proj_mul: has no CUDA kernel for a matrix in q8_0; leave out whole FFN"):
        run(instruction("up_proj_mul", row_mask=ins.row_mask, activations="fp32", **operands, **listed))


def test_nothing_is_read_behind_a_matrix_or_of_a_skipped_one() -> None:
    """The address of nothing: a read would end the process."""
    ins = down_proj(2)
    ins.row_mask.zero_()
    matrix = ins.tensors["down_proj"]
    absent = Matrix("q4_1", matrix.rows, matrix.columns, matrix.data[:0], layout="planes")
    run(replace(ins, tensors={**ins.tensors, "down_proj": absent}))
    assert not ins.tensors["hidden_states"].any()
