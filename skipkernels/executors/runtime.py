"""CudaRuntime: the little that the graph executor needs of a GPU: a stream, graphs and launches of instructions.

Graphs are captured by the extension where its CUDA part is built, else by torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Protocol

import torch

from skipkernels import _C
from skipkernels.errors import DeviceError
from skipkernels.executors.native import native_program
from skipkernels.program import Program
from skipkernels.program.state import DecodeState

Launcher = Callable[[int, int, bool], None]
"""Called as (index of the instruction, stream, may it start before the kernel in front of it has ended)."""


class Graph(Protocol):
    """A graph being captured, then launched as often as wanted."""

    @property
    def stream(self) -> int:
        """Where to launch what belongs to the innermost open body."""
        ...

    def capture(self) -> AbstractContextManager[None]: ...

    def if_any(self, when: torch.Tensor) -> AbstractContextManager[None]:
        """What is launched in it runs where any of ``when`` (i32 [batch]) is non-zero."""
        ...

    def while_any(self, active: torch.Tensor) -> AbstractContextManager[None]:
        """What is launched in it is repeated while any of ``active`` (i32 [batch]) is non-zero."""
        ...

    def set_steps(self, steps: int, stream: int) -> None:
        """How often a ``while_any`` body may run in the next launch."""
        ...

    def launch(self, stream: int) -> None: ...


class CudaRuntime:
    """The GPU ``device`` through torch and the extension."""

    native: ModuleType = _C

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stream(self) -> int:
        """torch's current stream."""
        return torch.cuda.current_stream(self._device).cuda_stream

    def synchronize(self, stream: int) -> None:
        torch.cuda.ExternalStream(stream, self._device).synchronize()

    def busy(self, stream: int) -> bool:
        return not torch.cuda.ExternalStream(stream, self._device).query()

    def refuse_while_capturing(self) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise DeviceError(
                "torch's current stream is being captured into a graph; load the engine before the capture begins"
            )

    def graph(self) -> Graph:
        return NativeGraph(self.native, self._device) if self.native.cuda_built else TorchGraph(self._device)

    def launcher(self, program: Program, state: DecodeState, kernels: str) -> Launcher:
        if kernels == "cuda":
            instructions = native_program(program, state, self.native)
            return self.native.CudaLauncher(instructions, self._device.index or 0).launch
        from skipkernels.kernels.triton import TRITON

        def launch(index: int, stream: int, programmatic: bool) -> None:
            with torch.cuda.stream(torch.cuda.ExternalStream(stream, self._device)):
                TRITON[program[index].op](program[index])

        return launch


class NativeGraph:
    """A graph captured by the extension (csrc/cuda/graph.h)."""

    def __init__(self, native: ModuleType, device: torch.device) -> None:
        self._graph = native.CudaGraph(device.index or 0)

    @property
    def stream(self) -> int:
        return self._graph.stream

    @contextmanager
    def capture(self) -> Iterator[None]:
        self._graph.begin()
        try:
            yield
            self._graph.finish()
        except BaseException:
            self._graph.abandon()
            raise

    @contextmanager
    def if_any(self, when: torch.Tensor) -> Iterator[None]:
        self._graph.begin_if(when.data_ptr(), when.numel())
        yield
        self._graph.end_body()

    @contextmanager
    def while_any(self, active: torch.Tensor) -> Iterator[None]:
        self._graph.begin_while(active.data_ptr(), active.numel())
        yield
        self._graph.end_body()

    def set_steps(self, steps: int, stream: int) -> None:
        self._graph.set_steps(steps, stream)

    def launch(self, stream: int) -> None:
        self._graph.launch(stream)


class TorchGraph:
    """A graph captured by torch: without WHILE nodes, and with IF nodes only where torch has them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    @contextmanager
    def capture(self) -> Iterator[None]:
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            yield

    @contextmanager
    def if_any(self, when: torch.Tensor) -> Iterator[None]:
        self._graph.begin_capture_to_if_node(when.any())
        yield
        self._graph.end_capture_to_conditional_node()

    def while_any(self, active: torch.Tensor) -> AbstractContextManager[None]:
        raise DeviceError("torch captures no WHILE nodes; use loop 'replay'")

    def set_steps(self, steps: int, stream: int) -> None:
        raise DeviceError("torch captures no WHILE nodes; use loop 'replay'")

    def launch(self, stream: int) -> None:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, self._device)):
            self._graph.replay()
