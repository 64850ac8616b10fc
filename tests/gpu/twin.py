"""An executor on a GPU that stands in for one on the CPU: buffers go over before an instruction and come back after."""

from dataclasses import fields, replace

import torch

from skipkernels.executors.execution import Execution
from skipkernels.executors.graph import GraphExecutor
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import ModelWeights
from skipkernels.program import Program, build_program
from skipkernels.program.state import DecodeState
from skipkernels.skipping.policy import Policy


def weights_on_gpu(weights: ModelWeights) -> ModelWeights:
    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.contiguous().cuda()

    layers = [
        replace(layer, **{item.name: moved(getattr(layer, item.name)) for item in fields(layer)})
        for layer in weights.layers
    ]
    others = ("embed_tokens", "norm", "lm_head", "rope_cos", "rope_sin")
    return replace(weights, layers=layers, **{name: moved(getattr(weights, name)) for name in others})


class GpuTwin:
    """Runs ``policy``'s program on a GPU over copies of the buffers of ``state``, which is on the CPU."""

    name = "gpu twin"

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, policy: Policy, state: DecodeState, execution: Execution
    ) -> None:
        self._state = state
        self._own = DecodeState.allocate(
            config,
            batch_size=state.batch_size,
            max_seq_len=state.max_seq_len,
            dtype=state.k_cache.dtype,
            device="cuda",
            layout=state.layout,
        )
        program = build_program(config, weights_on_gpu(weights), self._own, policy)
        self._executor = GraphExecutor(program, self._own, execution)

    @property
    def program(self) -> Program:
        return self._executor.program

    def run_instruction(self, index: int) -> None:
        for name, buffer in self._state.buffers():
            getattr(self._own, name).copy_(buffer)
        self._executor.run_instruction(index)
        for name, buffer in self._state.buffers():
            buffer.copy_(getattr(self._own, name))
