"""An executor on a GPU that stands in for one on the CPU: buffers go over before an instruction and come back after."""

from dataclasses import fields, replace
from typing import Any

import torch

from skipkernels.executors.execution import Execution
from skipkernels.executors.graph import GraphExecutor
from skipkernels.executors.runtime import CudaRuntime
from skipkernels.model.matrix import stacked
from skipkernels.model.weights import ModelWeights
from skipkernels.program import Program
from skipkernels.program.state import DecodeState
from tests.executors.programs import Case


def weights_on_gpu(weights: ModelWeights, device: str) -> ModelWeights:
    """A copy; a down_proj that lies transposed does so there too."""

    def moved(tensor: Any) -> Any:
        if tensor is None:
            return None
        if not isinstance(tensor, torch.Tensor):
            return stacked([part.to(device) for part in tensor.parts])
        is_transposed = tensor.dim() == 2 and tensor.T.is_contiguous() and not tensor.is_contiguous()
        return tensor.T.to(device, copy=True).T if is_transposed else tensor.to(device, copy=True)

    layers = [
        replace(layer, **{item.name: moved(getattr(layer, item.name)) for item in fields(layer)})
        for layer in weights.layers
    ]
    others = ("embed_tokens", "norm", "lm_head", "rope_cos", "rope_sin")
    return replace(weights, layers=layers, **{name: moved(getattr(weights, name)) for name in others})


class GpuTwin:
    """Runs a case's program on a GPU over copies of the buffers of ``state``, which is on the CPU."""

    name = "gpu twin"

    def __init__(
        self,
        case: Case,
        weights: ModelWeights,
        state: DecodeState,
        execution: Execution,
        runtime: CudaRuntime | None = None,
    ) -> None:
        """``runtime``: for a GPU that is none, in the tests of these tests."""
        device = "cpu" if runtime else execution.device
        self._state = state
        self._own = DecodeState.allocate(
            case.config(),
            num_sequences=state.num_sequences,
            num_prompt_rows=state.num_prompt_rows,
            max_seq_len=state.max_seq_len,
            num_blocks=state.num_blocks,
            dtype=state.k_cache.dtype,
            device=device,
            layout=state.layout,
            neurons=case.neuron_rows,
        )
        program = case.program(weights_on_gpu(weights, device), self._own)
        self._executor = GraphExecutor(program, self._own, execution, runtime)

    @property
    def program(self) -> Program:
        return self._executor.program

    def run_instruction(self, index: int) -> None:
        for name, buffer in self._state.buffers():
            getattr(self._own, name).copy_(buffer)
        self._executor.run_instruction(index)
        for name, buffer in self._state.buffers():
            buffer.copy_(getattr(self._own, name))
