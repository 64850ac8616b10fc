"""The Triton kernels of the decode program: one module per op, readable, portable, and in need of no compiler.

Launching one neither allocates nor waits, so a whole program can be captured in a CUDA graph once every kernel has run
(its first launch compiles it); with all ``row_mask`` flags zero such a run leaves no trace. Kernels go to the current
device and stream.
"""

from __future__ import annotations

from collections.abc import Callable

from skipkernels.errors import DeviceError
from skipkernels.program.table import Instruction

try:
    import triton  # noqa: F401
except ImportError as error:
    raise DeviceError("the triton kernels need Triton (Linux): pip install skipkernels[triton]") from error

from skipkernels.kernels.triton.advance import advance
from skipkernels.kernels.triton.branch_add import branch_add
from skipkernels.kernels.triton.decode_attention import decode_attention
from skipkernels.kernels.triton.down_proj_add import down_proj_add
from skipkernels.kernels.triton.down_proj_neurons_add import down_proj_neurons_add
from skipkernels.kernels.triton.embed import embed
from skipkernels.kernels.triton.experts_down_proj_add import experts_down_proj_add
from skipkernels.kernels.triton.experts_down_proj_neurons_add import experts_down_proj_neurons_add
from skipkernels.kernels.triton.experts_gate_up_act import experts_gate_up_act
from skipkernels.kernels.triton.gate_proj_act import gate_proj_act
from skipkernels.kernels.triton.gate_up_act import gate_up_act
from skipkernels.kernels.triton.launch import Launch
from skipkernels.kernels.triton.lm_head import lm_head
from skipkernels.kernels.triton.neuron_gate import neuron_gate
from skipkernels.kernels.triton.norm_rope_append import norm_rope_append
from skipkernels.kernels.triton.o_proj_add import o_proj_add
from skipkernels.kernels.triton.qkv_rope_append import qkv_rope_append
from skipkernels.kernels.triton.route_experts import route_experts
from skipkernels.kernels.triton.sample import sample
from skipkernels.kernels.triton.select_neurons import select_neurons
from skipkernels.kernels.triton.skip_gate import skip_gate
from skipkernels.kernels.triton.up_proj_mul import up_proj_mul

LAUNCHES: dict[str, Callable[[Instruction], tuple[Launch, ...]]] = {
    op.__name__: op
    for op in (
        embed,
        skip_gate,
        neuron_gate,
        qkv_rope_append,
        norm_rope_append,
        decode_attention,
        o_proj_add,
        gate_up_act,
        down_proj_add,
        branch_add,
        route_experts,
        experts_gate_up_act,
        experts_down_proj_add,
        experts_down_proj_neurons_add,
        gate_proj_act,
        select_neurons,
        up_proj_mul,
        down_proj_neurons_add,
        lm_head,
        sample,
        advance,
    )
}
"""What an instruction launches, in order."""


def _run(op: str) -> Callable[[Instruction], None]:
    def run(ins: Instruction) -> None:
        for launch in LAUNCHES[op](ins):
            launch()

    return run


TRITON: dict[str, Callable[[Instruction], None]] = {op: _run(op) for op in LAUNCHES}
