"""Engines on the CPU that load, arrange and decode as those on a GPU do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from skipkernels.executors import Executor
from skipkernels.model.matrix import BLOCK_FORMATS
from skipkernels.model.weights import into_planes
from skipkernels.program import Program, build_program, state
from skipkernels.program.state import LAYOUTS, DecodeState


def with_fp32_activations(*operands: Any, **options: Any) -> Program:
    """What engines on a GPU build."""
    return build_program(*operands, **{**options, "activations": "fp32"})


def load_as_for_a_gpu(patch: pytest.MonkeyPatch, executor: Callable[[Program, DecodeState], Executor]) -> None:
    """Engines that are loaded from now on execute by ``executor``."""
    patch.setitem(state.LAYOUTS, "cpu", LAYOUTS["cuda"])
    patch.setattr("skipkernels.model.block_weights.block_formats_on", lambda _: BLOCK_FORMATS)
    patch.setattr("skipkernels.executors.variants.get_executor", lambda _, program, buffers: executor(program, buffers))
    patch.setattr("skipkernels.engine.interleave", lambda weights, _: into_planes(weights))
    patch.setattr("skipkernels.executors.variants.build_program", with_fp32_activations)
    patch.setattr("skipkernels.engine.PROMPT_ROWS", 4)  # threads of an emulated device are slow
