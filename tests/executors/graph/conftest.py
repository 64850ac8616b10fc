"""The graph executor on the CPU: the extension with its CUDA part, compiled for the CPU, over a fake CUDA runtime."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from skipkernels.executors.runtime import CudaRuntime
from tests.cuda_host.build import build_core_extension, load_core_extension
from tests.cuda_host.controls import HostRuntime


class FakeDevice(CudaRuntime):
    """A GPU whose memory is that of the CPU; its default stream is that of the user."""

    def __init__(self, native: ModuleType, controls: HostRuntime) -> None:
        super().__init__(torch.device("cpu"))
        self.native = native
        self.controls = controls
        self.user_stream = 0

    def stream(self) -> int:
        return self.user_stream

    def synchronize(self, stream: int) -> None:
        if self.controls.failure:
            raise RuntimeError(self.controls.failure)

    def busy(self, stream: int) -> bool:
        return False

    def refuse_while_capturing(self) -> None:
        pass


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
