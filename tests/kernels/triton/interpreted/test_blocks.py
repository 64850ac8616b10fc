"""Matrices of blocks in the Triton kernels: multiplied as the reference does with fp32 activations; every word is read
once for a tile of rows, and none where nobody wants it."""

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet

from skipkernels.kernels.triton import TRITON
from skipkernels.model.matrix import BLOCK_FORMATS, Matrix
from skipkernels.program.reference import REFERENCE
from skipkernels.program.table import instruction
from skipkernels.skipping.policy import DensePolicy, SkipPolicy
from tests.executors.block_case import BlockCase
from tests.executors.float8_case import all_numbers
from tests.executors.programs import compare_program, guarded, same_bits
from tests.kernels.triton.interpreted.executor import TritonExecutor
from tests.kernels.triton.interpreted.test_reads import addresses, reads_of  # noqa: F401
from tests.matrices import random_matrix
from tests.tolerances import assert_close

MATRIX_OPS = ("embed", "qkv_rope_append", "o_proj_add", "gate_up_act", "down_proj_add", "lm_head")
OTHERS = {"q4_k": "q6_k", "q6_k": "q5_k", "q4_0": "q8_0", "q8_0": "q5_1", "f8_e4m3": "q8_0"}


def check(case: BlockCase, ops: Collection[str] = MATRIX_OPS) -> None:
    compare_program(case, lambda program, state: TritonExecutor(program, state, ops))


def with_rows(formats: Collection[str], most: int) -> list[ParameterSet]:
    """Every format with one row or with ``most``, in turns; its other half takes 5 s each and is slow."""
    cases = [(format, rows) for format in formats for rows in (1, most)]
    return [
        pytest.param(format, rows, marks=[pytest.mark.slow] * (index % 4 in (1, 2)))
        for index, (format, rows) in enumerate(cases)
    ]


@pytest.mark.parametrize(("format", "rows"), with_rows(BLOCK_FORMATS, 3))
def test_every_op_agrees_in_every_format(format: str, rows: int) -> None:
    check(BlockCase.of(format, seq_lens=(5, 9, 0)[:rows]))


@pytest.mark.parametrize(("format", "rows"), with_rows(OTHERS, 2))
def test_v_and_up_may_have_other_formats(format: str, rows: int) -> None:
    check(BlockCase.of(format, OTHERS[format], seq_lens=(5, 9)[:rows], qk_norm=rows == 2, qkv_bias=True))


@pytest.mark.parametrize("format", ["q8_0", "q4_1"])
def test_rows_in_several_tiles_agree(format: str) -> None:
    """20 rows, of prompts beside sequences, some of which skip; 416 columns fill a tile and a part of the next."""
    policies = SkipPolicy(threshold=0.3, span=1, cold_start=0, cold_end=0, warmup_tokens=0), DensePolicy()
    case = BlockCase.of(
        format,
        seq_lens=(9, 12, 8, 5),
        prompt_rows=(6, 5, 4, 0),
        active=(True, True, True, False),
        intermediate_size=416,
        num_layers=2,
        policies=policies,
    )
    check(case, ["gate_up_act", "down_proj_add"])


@pytest.mark.parametrize(("format", "rows"), with_rows(["q8_0", "q5_0", "q4_1"], 2))
def test_long_rows_take_several_tiles(format: str, rows: int) -> None:
    check(BlockCase.of(format, seq_lens=(5, 9)[:rows], intermediate_size=6176), ["down_proj_add"])


@pytest.mark.parametrize("op", MATRIX_OPS[1:])
def test_rows_alone_and_together_agree_bit_by_bit(op: str) -> None:
    case = BlockCase.of("q4_1", "q8_0", seq_lens=(4, 5, 6))
    together, alone = case.state(), replace(case, active=(False, True, False)).state()
    for state in (together, alone):
        program = case.program(case.weights(), state)
        for index, ins in enumerate(program[:-2]):
            TritonExecutor(program, state, [op]).run_instruction(index)
            if ins.op == op:
                break
    for name in ("query", "hidden_states", "intermediate", "logits"):
        assert same_bits(getattr(together, name)[1], getattr(alone, name)[1]), name


@pytest.mark.parametrize("rows", [1, 2])
def test_every_number_of_8_bits_is_multiplied(rows: int) -> None:
    ins, expected = all_numbers(rows)
    TRITON[ins.op](ins)
    assert torch.equal(ins.tensors["hidden_states"], expected)


MATRICES = {
    "qkv_rope_append": "qkv_proj",
    "o_proj_add": "o_proj",
    "gate_up_act": "gate_up_proj",
    "down_proj_add": "down_proj",
    "lm_head": "lm_head",
}


@pytest.mark.parametrize(("rows", "tiles"), [(1, 1), (3, 1), (20, 2)])
@pytest.mark.parametrize("op", MATRICES)
def test_every_word_of_codes_is_read_once_for_a_tile_of_rows(
    op: str,
    rows: int,
    tiles: int,
    addresses: list[np.ndarray],  # noqa: F811
) -> None:
    case = BlockCase.of("q4_0", "q8_0", seq_lens=(3,) * rows, idle_rows=0)
    (ins,) = [ins for ins in case.program(case.weights(), case.state()) if ins.op == op]
    addresses.clear()
    TRITON[op](ins)
    for part in ins.tensors[MATRICES[op]].parts:
        words = part.rows * -(-part.columns // 128) * (16 if part.format == "q4_0" else 32)
        assert (reads_of(part.data.view(torch.int32)[:words], addresses) == tiles).all()


def test_nothing_of_a_skipped_ffn_is_read(addresses: list[np.ndarray]) -> None:  # noqa: F811
    case = BlockCase.of("q4_1", seq_lens=(3, 4), num_layers=2)
    state = case.state()
    program = case.program(case.weights(), state)
    state.run_ffn[1] = 0
    skipped = [ins for ins in program if ins.op in ("gate_up_act", "down_proj_add")][2:]
    addresses.clear()
    for ins in skipped:
        TRITON[ins.op](ins)
        (matrix,) = ins.matrices.values()
        assert not any(reads_of(part.data, addresses).any() for part in matrix.parts)
    assert addresses  # of flags


@pytest.mark.parametrize("rows", [1, 3])
def test_only_listed_rows_of_up_proj_are_read(rows: int, addresses: list[np.ndarray]) -> None:  # noqa: F811
    """Where down_proj holds floats, as in a file of several types, neurons can be left out of gate_proj and up_proj."""
    gate, up = (random_matrix(format, 40, 96).arranged("planes") for format in ("q4_1", "q8_0"))
    x, kept = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)), torch.tensor([2, 3, 11, 39])

    def run(kernels: dict, gate_proj: Matrix, up_proj: Matrix) -> torch.Tensor:
        shared = {
            "row_mask": torch.ones(rows, dtype=torch.int32),
            "activations": "fp32",
            "hidden_states": guarded(x),
            "post_attention_layernorm": torch.linspace(0.5, 1.5, 96),
            "intermediate": guarded(torch.zeros(rows, 40)),
            "rms_norm_eps": 1e-5,
        }
        kernels["gate_proj_act"](instruction("gate_proj_act", gate_proj=gate_proj, activation=0, **shared))
        neurons = torch.zeros(40, dtype=torch.int32)
        neurons[:4] = kept
        number = torch.tensor([4], dtype=torch.int32)
        addresses.clear()
        kernels["up_proj_mul"](
            instruction("up_proj_mul", up_proj=up_proj, neurons=neurons, num_neurons=number, **shared)
        )
        return shared["intermediate"]

    actual = run(TRITON, gate, up)
    words = reads_of(up.data.view(torch.int32)[: 40 * 32], addresses).reshape(40, 32)
    assert (words == torch.isin(torch.arange(40), kept).numpy()[:, None]).all()
    assert_close(actual, run(REFERENCE, gate, up), "fp32")
