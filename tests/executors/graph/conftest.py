"""The graph executor on the CPU: the extension with its CUDA part, compiled for the CPU, over a fake CUDA runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from skipkernels import Engine
from skipkernels.executors.execution import Execution
from skipkernels.executors.graph import GraphExecutor
from skipkernels.executors.runtime import CudaRuntime
from tests.cuda_host.build import build_core_extension, load_core_extension
from tests.cuda_host.controls import HostRuntime
from tests.executors.gpu_engines import load_as_for_a_gpu
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

        load_as_for_a_gpu(monkeypatch, lambda *operands: GraphExecutor(*operands, execution, device))
        return tiny_engine(**options)

    return build
