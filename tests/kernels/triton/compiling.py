"""Compiles what an instruction launches for a GPU that need not be there."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from skipkernels.benchmark.shapes import shape_config
from skipkernels.kernels.triton import LAUNCHES
from skipkernels.kernels.triton.launch import Launch
from skipkernels.model.config import ModelConfig
from skipkernels.model.matrix import AnyMatrix, Matrix, StackedMatrix
from skipkernels.model.planes import PlaneSizes
from skipkernels.model.weights import ModelWeights, allocate_weights
from skipkernels.program import build_program
from skipkernels.program.state import LAYOUTS, DecodeState, Layout

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Compiled:
    """A kernel's code and what a program of its grid takes."""

    name: str
    options: dict[str, int | bool]
    ptx: str
    registers: int  # per thread
    stack_bytes: int  # per thread: spilled registers
    shared_bytes: int


def launches(
    shapes: str,
    dtype: torch.dtype,
    num_sequences: int,
    num_prompt_rows: int,
    *,
    gated: bool,
    neurons: bool = False,
    formats: tuple[str, str] | None = None,
    layout: Layout = LAYOUTS["cuda"],
    **changes: object,
) -> Iterator[Launch]:
    """One of each kernel that a decode of these shapes launches; no memory is taken for the model. ``formats``: of
    blocks that the matrices hold; v_proj and up_proj are in the second."""
    config = ModelConfig.from_hf(shape_config(shapes, 4096))
    config = replace(config, num_hidden_layers=2, sliding_windows=(None, None), **changes)  # type: ignore[arg-type]
    weights = allocate_weights(config, dtype, 4096, "meta", neuron_rows=neurons)
    if formats is not None:
        _in_blocks(weights, config, *formats)
    state = DecodeState.allocate(
        config,
        num_sequences=num_sequences,
        num_prompt_rows=num_prompt_rows,
        max_seq_len=4096,
        dtype=dtype,
        device="meta",
        layout=layout,
        neurons=neurons,
    )
    built = build_program(config, weights, state, gated=gated, neurons=neurons, activations="fp32")
    program = {ins.op: ins for ins in built}
    for op, ins in program.items():
        yield from LAUNCHES[op](ins)


def _in_blocks(weights: ModelWeights, config: ModelConfig, format: str, other: str) -> None:
    def blocks(kind: str, rows: int, columns: int) -> Matrix:
        data = torch.empty(PlaneSizes.of(kind, rows, columns).nbytes, dtype=torch.uint8, device="meta")
        return Matrix(kind, rows, columns, data, layout="planes")

    def stack(rows: int, last: int, columns: int) -> AnyMatrix:
        if format == other:
            return blocks(format, rows + last, columns)
        return StackedMatrix((blocks(format, rows, columns), blocks(other, last, columns)))

    hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    for layer in weights.layers:
        layer.qkv_proj = stack(config.qkv_size - kv, kv, hidden)
        layer.o_proj = blocks(format, hidden, config.attention_size)
        layer.gate_up_proj = stack(inner, inner, hidden)
        layer.down_proj = blocks(format, hidden, inner)
    weights.embed_tokens = weights.lm_head = blocks(format, config.vocab_size, hidden)


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compiles for a compute capability (80, 90, 100 ...), with all that Triton's own launcher would specialise on."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = _POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    usage = _resource_usage(compiled.asm["cubin"])
    return Compiled(
        name=launch.kernel.__name__,
        options=launch.options,
        ptx=compiled.asm["ptx"],
        registers=usage["REG"],
        stack_bytes=usage["STACK"],
        shared_bytes=compiled.metadata.shared,
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", listed)}
