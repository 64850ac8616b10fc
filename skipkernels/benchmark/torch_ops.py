"""What torch itself offers for an op of the instruction set: the same inputs, the same matrices, no rounding spared.

Only the costly part of an op has a counterpart. The rest (norm, rotary embedding, residual) is fused into our kernels
and left out here, to torch's advantage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from skipkernels.model.matrix import MatrixOperand, TransposedMatrix, as_tensor, column_nbytes
from skipkernels.program.table import Instruction


def torch_counterpart(ins: Instruction) -> Callable[[], object] | None:
    """A call that does with torch what ``ins`` spends its time on, for the rows that are active; None where torch has
    nothing."""
    t, rows = ins.tensors, ins.row_mask.nonzero()[:, 0]
    whole = {"qkv_rope_append": "qkv_proj", "gate_up_act": "gate_up_proj", "gate_proj_act": "gate_proj"}
    matrix = whole.get(ins.op)
    if matrix is None and ins.op in ("o_proj_add", "down_proj_add", "lm_head"):
        matrix = ins.op.removesuffix("_add")
    if matrix is not None:
        weight = as_tensor(t[matrix], torch.bfloat16)  # of blocks what torch would multiply in their place
        x = torch.randn(len(rows), weight.shape[1], device=weight.device).to(weight.dtype)
        return lambda: F.linear(x, weight)
    if ins.op == "decode_attention":
        blocks = t["block_table"][t["row_sequence"][rows].long()]
        length = int(t["row_position"][rows].max()) + 1
        query = t["query"][rows].to(t["k_cache"].dtype)[:, :, None]
        keys, values = (  # one strip per row, as torch wants it
            t[name][blocks.clamp(min=0).long()].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()
            for name in ("k_cache", "v_cache")
        )
        return lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    if ins.op == "embed":
        ids = t["input_ids"][rows].long()
        if not isinstance(t["embed_tokens"], torch.Tensor):
            return None
        return lambda: F.embedding(ids, t["embed_tokens"])
    if ins.op == "sample":
        return lambda: t["logits"].argmax(dim=-1)
    return None


def read_nbytes(matrix: MatrixOperand, listed: int | None) -> float:
    """Bytes of a matrix that are read for so many listed neurons, its rows; None: all. Scales that 32 neurons share are
    taken to be read."""
    if listed is None:
        return matrix.nbytes
    left_out = matrix.shape[0] - listed
    own = column_nbytes(matrix.matrix) if isinstance(matrix, TransposedMatrix) else matrix.nbytes / matrix.shape[0]
    return matrix.nbytes - left_out * own


def bytes_of(ins: Instruction) -> int:
    """Bytes that ``ins`` must move at least: its matrix, the listed rows of it, or its share of the cache, once for all
    rows."""
    t, s, rows = ins.tensors, ins.sizes, int((ins.row_mask != 0).sum())
    if ins.op == "decode_attention":
        window = int(ins.scalars["sliding_window"])
        positions = sum(
            min(length + 1, window or length + 1) for length in t["row_position"][ins.row_mask != 0].tolist()
        )
        return 2 * positions * s["num_key_value_heads"] * s["head_dim"] * t["k_cache"].element_size()
    for name in ("qkv_proj", "o_proj", "gate_up_proj", "gate_proj", "up_proj", "down_proj", "lm_head"):
        if name in t:
            listed = t.get("num_neurons")
            return round(read_nbytes(t[name], None if listed is None else int(listed)))
    if ins.op == "embed":
        return round(rows * (t["embed_tokens"].nbytes / s["vocab_size"] + s["hidden_size"] * 4))
    if ins.op == "branch_add":
        return rows * s["hidden_size"] * 16  # branch and hidden_states, read and written
    if ins.op == "norm_rope_append":
        return rows * s["qkv_size"] * 12  # qkv read and zeroed, query and the caches written
    if ins.op == "sample":
        return rows * s["vocab_size"] * 5  # logits and seen
    if ins.op == "select_neurons":
        return rows * s["intermediate_size"] * 8  # read and written
    if ins.op == "neuron_gate":
        return rows * 36  # what it reads and writes of a sequence
    if ins.op == "skip_gate":
        return t["similarity_partials"].nbytes
    return rows * s["num_hidden_layers"] * 16  # advance: run_ffn and similarity, read and written
