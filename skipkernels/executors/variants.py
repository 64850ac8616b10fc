"""Variants: the executors of one model's weights over one state, one for each variant of its program."""

from __future__ import annotations

from skipkernels.executors import Executor, get_executor
from skipkernels.executors.execution import Execution
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import ModelWeights
from skipkernels.program.program import Variant, build_program
from skipkernels.program.state import DecodeState


class Variants:
    """``variants[variant]`` is the executor of that variant, built when it is first asked for."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, state: DecodeState, execution: Execution) -> None:
        """``execution``: what ``Execution.resolved`` returned."""
        self._config = config
        self._weights = weights
        self._state = state
        self._execution = execution
        self._executors: dict[Variant, Executor] = {}

    def __getitem__(self, variant: Variant) -> Executor:
        """Raises a DeviceError where the executor cannot run the variant's program."""
        if variant not in self._executors:
            program = build_program(
                self._config,
                self._weights,
                self._state,
                gated=variant.gated,
                neurons=variant.neurons,
                activations="fp32" if self._execution.on_gpu else "int8",
            )
            self._executors[variant] = get_executor(self._execution, program, self._state)
        return self._executors[variant]

    def __setitem__(self, variant: Variant, executor: Executor) -> None:
        self._executors[variant] = executor
