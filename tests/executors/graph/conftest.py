"""The graph executor on the CPU: the extension with its CUDA part, compiled for the CPU, over a fake CUDA runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from skipkernels import Engine
from skipkernels.executors import Executor
from skipkernels.executors.execution import Execution
from skipkernels.executors.graph import GraphExecutor
from skipkernels.executors.runtime import CudaRuntime
from skipkernels.model.weights import into_planes
from skipkernels.program import Program, build_program, state
from skipkernels.program.state import LAYOUTS, DecodeState
from tests.cuda_host.build import build_core_extension, load_core_extension
from tests.cuda_host.controls import HostRuntime
from tests.models import tiny_engine

GpuEngine = Callable[..., Engine]


class FakeDevice(CudaRuntime):
    """A GPU whose memory is that of the CPU; its default stream is torch's current one."""

    def __init__(self, native: ModuleType, controls: HostRuntime, index: int = 0, **options: Any) -> None:
        super().__init__(torch.device("cuda", index), **options)
        self.native = native
        self.controls = controls
        self.user_stream = 0

    def stream(self) -> int:
        return self.user_stream


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(13000, id="cuda-13.0"),
        pytest.param(12040, id="cuda-12.4", marks=pytest.mark.slow),  # compiles every kernel once more
    ],
)
def library(request: pytest.FixtureRequest) -> tuple[ModuleType, HostRuntime]:
    path = build_core_extension(cuda_version=request.param)
    return load_core_extension(path), HostRuntime(path)


@pytest.fixture
def device(library: tuple[ModuleType, HostRuntime]) -> Iterator[FakeDevice]:
    native, controls = library
    controls.reset()
    yield FakeDevice(native, controls)
    assert not controls.failure


def with_fp32_activations(*operands: Any, **options: Any) -> Program:
    """What engines on a GPU build."""
    return build_program(*operands, **{**options, "activations": "fp32"})


@pytest.fixture
def gpu_engine(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> GpuEngine:
    """Engines whose executors are graphs on the fake device."""

    fake = device

    def build(
        conditional: str = "predicate",
        loop: str = "replay",
        debug: bool = False,
        device: FakeDevice = fake,
        **options: object,
    ) -> Engine:
        execution = Execution("cuda", "graph", kernels="cuda", conditional=conditional, loop=loop, debug=debug)

        def get_executor(_: Execution, program: Program, buffers: DecodeState) -> Executor:
            return GraphExecutor(program, buffers, execution, device)

        monkeypatch.setitem(state.LAYOUTS, "cpu", LAYOUTS["cuda"])
        monkeypatch.setattr("skipkernels.executors.variants.get_executor", get_executor)
        monkeypatch.setattr("skipkernels.engine.interleave", lambda weights, _: into_planes(weights))
        monkeypatch.setattr("skipkernels.executors.variants.build_program", with_fp32_activations)
        monkeypatch.setattr("skipkernels.engine.PROMPT_ROWS", 4)  # threads of an emulated device are slow
        return tiny_engine(**options)

    return build
