"""The op table: the same fields as the native instruction set, and errors that name what is wrong."""

from typing import Any

import pytest
import torch

from skipkernels import _C
from skipkernels.program.reference import REFERENCE
from skipkernels.program.state import LAYOUTS
from skipkernels.program.table import OPS, Instruction, instruction
from skipkernels.skipping.policy import BATCH_RULES, GATE_MODES
from tests.matrices import random_matrix


def test_python_and_native_code_know_the_same_ops() -> None:
    assert list(OPS) == list(_C.instruction_set())
    assert list(OPS) == list(REFERENCE)


@pytest.mark.parametrize("name", OPS)
def test_python_and_native_code_know_the_same_fields(name: str) -> None:
    op = OPS[name]
    fields = {field: "matrix" if spec.dtype == "matrix" else "tensor" for field, spec in op.tensors.items()}
    fields |= dict.fromkeys(op.symbols, "size")
    fields |= {field: kind.__name__ for field, kind in op.scalars.items()}
    assert _C.instruction_set()[name] == fields


def test_python_and_native_code_have_the_same_limits() -> None:
    assert _C.rows_per_partial == LAYOUTS["cpu"].rows_per_partial
    assert GATE_MODES == (
        "similarity",
        "fixed",
        "random",
    )  # from 1 on in program.h, where 0 is dense
    assert BATCH_RULES == ("per_row", "all", "majority")


def operands() -> dict[str, Any]:
    """A valid o_proj_add."""
    return {
        "row_mask": torch.ones(2, dtype=torch.int32),
        "attn_output": torch.zeros(2, 3, 4),
        "o_proj": torch.zeros(5, 12),
        "o_proj_bias": None,
        "hidden_states": torch.zeros(2, 5),
    }


def test_a_valid_instruction_knows_its_sizes() -> None:
    ins = instruction("o_proj_add", **operands())
    assert ins.sizes == {
        "num_rows": 2,
        "num_attention_heads": 3,
        "head_dim": 4,
        "hidden_size": 5,
        "attention_size": 12,
    }
    ins.row_mask[0] = 0
    assert ins.rows == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(5)}, "o_proj_add: unknown operand 'bias'; it takes attn_output, hidden_states"),
        ({"o_proj": None}, "operand o_proj is missing"),
        ({"o_proj": [1.0]}, "o_proj must be a matrix, got list"),
        (
            {"o_proj": torch.zeros(5, 12, dtype=torch.int8)},
            "o_proj: a matrix of torch.int8 is not supported",
        ),
        ({"hidden_states": torch.zeros(2, 5).half()}, "hidden_states has dtype torch.float16, expected torch.float32"),
        ({"hidden_states": torch.zeros(5)}, r"hidden_states has shape \(5,\), expected \(num_rows, hidden_size\)"),
        ({"hidden_states": torch.zeros(5, 2).T}, r"hidden_states is not contiguous \(strides \(1, 2\)\)"),
        ({"hidden_states": torch.zeros(2, 5, device="meta")}, "hidden_states is on meta, expected cpu"),
        ({"hidden_states": torch.zeros(3, 5)}, "hidden_states has num_rows=3, expected 2"),
        ({"o_proj_bias": torch.zeros(6)}, "o_proj_bias has hidden_size=6, expected 5"),
        ({"o_proj": torch.zeros(5, 13)}, "break the relation: attention_size = num_attention_heads head_dim"),
        ({"row_mask": torch.ones(2)}, r"row_mask must be int32 \[2\], got torch.float32 \[2\]"),
        ({"row_mask": torch.ones(3, dtype=torch.int32)}, r"row_mask must be int32 \[2\]"),
    ],
)
def test_a_wrong_operand_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instruction("o_proj_add", **{**operands(), **change})


def test_a_missing_scalar_is_named() -> None:
    tensors = {
        "hidden_states": torch.zeros(1, 4),
        "norm": torch.zeros(4),
        "lm_head": torch.zeros(3, 4),
        "logits": torch.zeros(1, 3),
    }
    with pytest.raises(ValueError, match="lm_head: operand rms_norm_eps is missing"):
        instruction("lm_head", row_mask=torch.ones(1, dtype=torch.int32), **tensors)


def lm_head(num_rows: int, num_sequences: int, flags: int) -> Instruction:
    return instruction(
        "lm_head",
        row_mask=torch.ones(flags, dtype=torch.int32),
        hidden_states=torch.zeros(num_rows, 4),
        norm=torch.zeros(4),
        lm_head=torch.zeros(3, 4),
        logits=torch.zeros(num_sequences, 3),
        rms_norm_eps=1e-5,
        softcap=0.0,
    )


def test_prompt_rows_take_no_part_in_what_is_done_for_sequences() -> None:
    assert lm_head(num_rows=5, num_sequences=2, flags=2).rows == [0, 1]
    with pytest.raises(ValueError, match=r"lm_head: row_mask must be int32 \[2\], got torch.int32 \[5\]"):
        lm_head(num_rows=5, num_sequences=2, flags=5)
    of_sequences = [name for name, op in OPS.items() if op.rows == "num_sequences"]
    assert of_sequences == ["skip_gate", "neuron_gate", "lm_head", "sample"]


def test_both_caches_share_a_dtype() -> None:
    with pytest.raises(ValueError, match=r"v_cache has dtype torch.float32, expected torch.float16 as its fellows"):
        instruction(
            "qkv_rope_append",
            row_mask=torch.ones(1, dtype=torch.int32),
            hidden_states=torch.zeros(1, 4),
            input_layernorm=torch.zeros(4),
            qkv_proj=torch.zeros(6, 4),
            rope_cos=torch.zeros(8, 1),
            rope_sin=torch.zeros(8, 1),
            query=torch.zeros(1, 1, 2),
            k_cache=torch.zeros(1, 1, 8, 2).half(),
            v_cache=torch.zeros(1, 1, 8, 2),
            block_table=torch.zeros(1, 1, dtype=torch.int32),
            row_sequence=torch.zeros(1, dtype=torch.int32),
            row_position=torch.zeros(1, dtype=torch.int32),
            rms_norm_eps=1e-5,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "no_such_op"}, "unknown op 'no_such_op'"),
        ({"dtype": "fp8"}, "unknown cache dtype 'fp8'; use fp32, bf16 or fp16"),
        ({"num_rows": 0}, "num_rows must be at least 1, got 0"),
        ({"row_mask": 0}, "row_mask is a null pointer"),
        ({"operands": {}}, "embed takes 9 operands, got 0"),
    ],
)
def test_native_instructions_are_checked_too(change: dict[str, Any], message: str) -> None:
    names = _C.instruction_set()["embed"]
    operands = {name: [(1, "f32", "rows", 1)] if kind == "matrix" else 1 for name, kind in names.items()}
    valid = {"op": "embed", "dtype": "fp32", "row_mask": 1, "num_rows": 1, "operands": operands}
    _C.Instruction(**valid)
    with pytest.raises(ValueError, match=message):
        _C.Instruction(**{**valid, **change})


def test_a_matrix_of_blocks_is_an_operand_like_one_of_floats() -> None:
    ins = instruction(
        "o_proj_add", **{**operands(), "o_proj": random_matrix("q4_0", 5, 32), "attn_output": torch.zeros(2, 4, 8)}
    )
    assert (ins.sizes["hidden_size"], ins.sizes["attention_size"]) == (5, 32)
    with pytest.raises(ValueError, match="unknown activations 'int4'; use one of int8"):
        instruction("o_proj_add", activations="int4", **operands())
