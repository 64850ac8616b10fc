"""Where a part of the suite measures: on the GPU at published shapes, or dry, on the CPU at tiny ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from skipkernels.benchmark import bandwidth, shapes
from skipkernels.engine import Engine
from skipkernels.executors.execution import Execution
from skipkernels.executors.graph import GraphExecutor
from skipkernels.executors.kernel_options import KernelOptions
from skipkernels.executors.runtime import CudaRuntime
from skipkernels.model.config import ModelConfig, resolve_dtype
from skipkernels.model.matrix import BLOCK_FORMATS, AnyMatrix, Matrix
from skipkernels.model.weights import ModelWeights, fill_rope, random_weights
from skipkernels.program import Program, build_program
from skipkernels.program.program import Variant
from skipkernels.program.state import LAYOUTS, DecodeState

if TYPE_CHECKING:
    from skipkernels.skipping.policy import Policy


_HALVES = {"q8_0": (0,), "q4_0": (0,), "q4_k": (0, 2)}
"""Where the fp16 numbers of a block begin."""


def put_into_blocks(weights: ModelWeights, format: str) -> None:
    """Random blocks in place of all matrices, as a file would hold them."""

    def blocks(matrix: AnyMatrix) -> Matrix:
        rows, columns = matrix.shape
        size = BLOCK_FORMATS[format].row_bytes(columns)
        data = torch.randint(256, (rows, size), dtype=torch.uint8, device=matrix.device)
        halves = data.view(rows, -1, BLOCK_FORMATS[format].block_bytes)
        scale = torch.tensor([2.0**-12], dtype=torch.float16, device=matrix.device).view(torch.uint8)
        for at in _HALVES[format]:
            halves[:, :, at : at + 2] = scale
        return Matrix(format, rows, columns, data)

    for layer in weights.layers:
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            setattr(layer, name, blocks(getattr(layer, name)))
    tied = weights.lm_head is weights.embed_tokens
    weights.embed_tokens = blocks(weights.embed_tokens)
    weights.lm_head = weights.embed_tokens if tied else blocks(weights.lm_head)


@dataclass(frozen=True)
class Setting:
    dry: bool

    @classmethod
    def of(cls, dry: bool) -> Setting:
        if dry:
            from bench.gpu.dry_run import TINY

            shapes.SHAPES["tiny"] = dict(TINY)
            bandwidth.PROBE_BYTES = 1 << 22
        return cls(dry)

    def execution(self, conditional: str = "auto", loop: str = "auto") -> Execution:
        if self.dry:
            return Execution(num_threads=1).resolved()
        return Execution(device="cuda", kernels="cuda", conditional=conditional, loop=loop).resolved()

    def names(self, *published: str) -> tuple[str, ...]:
        return ("tiny",) if self.dry else published

    def engine(
        self,
        name: str,
        length: int,
        layers: int | None = None,
        execution: Execution | None = None,
        neuron_rows: bool = False,
        format: str | None = None,
    ) -> Engine:
        """Random weights of the named shapes, in bf16 or in blocks of ``format``."""
        execution = execution or self.execution()
        hf_config = shapes.shape_config(name, length)
        hf_config.num_hidden_layers = layers or hf_config.num_hidden_layers
        config = ModelConfig.from_hf(hf_config)
        weights = random_weights(
            config, resolve_dtype("bf16"), length, device=execution.device, neuron_rows=neuron_rows
        )
        fill_rope(weights, hf_config)
        if format is not None:
            put_into_blocks(weights, format)
        return Engine(config, weights, max_seq_len=length, execution=execution)

    def state(self, engine: Engine) -> DecodeState:
        """The buffers that executors of ``executor`` work on."""
        if not self.dry:
            return engine.state
        return DecodeState.allocate(  # the fake device's memory is the CPU's, its kernels are not
            engine.config,
            num_sequences=1,
            max_seq_len=engine.max_seq_len,
            dtype=torch.bfloat16,
            layout=LAYOUTS["cuda"],
            neurons=engine.weights.neuron_rows,
        )

    def program(self, engine: Engine, state: DecodeState, policy: Policy) -> Program:
        """The program that ``policy`` needs."""
        variant = Variant.for_plans([policy.plan(engine.config.num_hidden_layers)])
        return build_program(engine.config, engine.weights, state, gated=variant.gated, neurons=variant.neurons)

    def place(self, engine: Engine, state: DecodeState, policy: Policy, position: int) -> None:
        """One sequence with so many tokens and blocks of its own, all but the last token cached, whatever they hold."""
        state.set_blocks(0, range(state.num_blocks))
        state.begin_sequence(0, torch.zeros(position, dtype=torch.int32))
        state.set_policy(0, policy.plan(engine.config.num_hidden_layers))
        state.max_new_tokens.fill_(state.max_seq_len)
        state.start_decoding(0)

    def executor(
        self,
        engine: Engine,
        state: DecodeState,
        policy: Policy,
        options: KernelOptions,
        stamps: torch.Tensor | None = None,
    ) -> GraphExecutor:
        """A graph of ``engine``'s step whose kernels have these options."""
        program = self.program(engine, state, policy)
        execution = Execution("cuda", "graph", kernels="cuda", conditional="predicate", loop="replay")
        return GraphExecutor(program, state, execution, self._runtime(state, options, stamps))

    def _runtime(self, state: DecodeState, options: KernelOptions, stamps: torch.Tensor | None) -> CudaRuntime:
        given: dict[str, Any] = {"options": options, "stamps": stamps}
        if self.dry:
            from bench.gpu.dry_run import FakeDevice

            return FakeDevice(**given)
        return CudaRuntime(state.active.device, **given)
