"""CudaRuntime: the little that the graph executor needs of a GPU: a stream, graphs and launches of instructions.

Graphs are captured by the extension where its CUDA part is built, else by torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Protocol

import torch

from skipkernels import _C
from skipkernels.errors import DeviceError
from skipkernels.executors.kernel_options import KernelOptions
from skipkernels.executors.native import native_program
from skipkernels.executors.support import CAPTURED, current_stream_is_captured
from skipkernels.program import Program
from skipkernels.program.state import DecodeState


class Launcher(Protocol):
    """Launches the instructions of one program. ``programmatic``: the kernel may start before the one in front of it
    has ended."""

    def launch(self, index: int, stream: int, programmatic: bool) -> None:
        """One instruction alone."""
        ...

    def launch_in_step(self, index: int, stream: int, programmatic: bool) -> bool:
        """The same where all instructions are launched in order: False where the next one's kernel will do it."""
        ...


class Graph(Protocol):
    """A graph being captured, then launched as often as wanted."""

    @property
    def stream(self) -> int:
        """Where to launch what belongs to the innermost open body."""
        ...

    def capture(self) -> AbstractContextManager[None]: ...

    def if_any(self, row_mask: torch.Tensor) -> AbstractContextManager[None]:
        """What is launched in it runs where any of ``row_mask`` (i32 [batch]) is non-zero."""
        ...

    def while_any(self, active: torch.Tensor) -> AbstractContextManager[None]:
        """What is launched in it is repeated while any of ``active`` (i32 [batch]) is non-zero."""
        ...

    def set_steps(self, steps: int, stream: int) -> None:
        """How often a ``while_any`` body may run in the next launch."""
        ...

    def launch(self, stream: int) -> None: ...


def torch_stream(stream: int, device: torch.device) -> torch.cuda.Stream:
    """torch's object for a stream's handle. ``ExternalStream(0)`` is a fresh stream of torch's pool, not stream 0."""
    return torch.cuda.ExternalStream(stream, device) if stream else torch.cuda.default_stream(device)


class CudaRuntime:
    """The GPU ``device``, whose index is known, through torch and the extension. Streams are handles, as torch has
    them: 0 is the device's default stream."""

    native: ModuleType = _C

    def __init__(
        self, device: torch.device, options: KernelOptions | None = None, stamps: torch.Tensor | None = None
    ) -> None:
        """``stamps``: on the device, i64 [instructions, 3], see csrc/cuda/kernels.h; kept alive by the caller."""
        if device.index is None:
            raise ValueError(f"{device} names no GPU, for torch may be at another one; a tensor's device does")
        self._device = device
        self._index = device.index
        self._options = options or KernelOptions()
        self._stamps = stamps

    def stream(self) -> int:
        """torch's current stream."""
        return torch.cuda.current_stream(self._device).cuda_stream

    def synchronize(self, stream: int) -> None:
        if self.native.cuda_built:
            self.native.cuda_synchronize(stream, self._index)
        else:
            torch_stream(stream, self._device).synchronize()

    def busy(self, stream: int) -> bool:
        if self.native.cuda_built:
            return self.native.cuda_is_busy(stream, self._index)
        return not torch_stream(stream, self._device).query()

    def refuse_while_capturing(self, stream: int) -> None:
        """
        Raises:
            DeviceError: what is put into ``stream`` would become part of somebody's graph.
        """
        if self.native.cuda_built:
            captured = self.native.cuda_is_capturing(stream, self._index)
        else:
            captured = current_stream_is_captured(self._device)
        if captured:
            raise DeviceError(CAPTURED)

    @property
    def instantiation_errors(self) -> tuple[type[Exception], ...]:
        """What a graph raises that was captured but cannot be instantiated as it is."""
        return (self.native.CudaInstantiationError,) if self.native.cuda_built else ()

    def graph(self) -> Graph:
        return NativeGraph(self.native, self._index) if self.native.cuda_built else TorchGraph(self._device)

    def launcher(self, program: Program, state: DecodeState, kernels: str) -> Launcher:
        if kernels == "cuda":
            instructions = native_program(program, state, self.native)
            stamps = 0 if self._stamps is None else self._stamps.data_ptr()
            return self.native.CudaLauncher(instructions, self._index, self._options.native(self.native), stamps)
        return TritonLauncher(program, self._device)


class TritonLauncher:
    """Triton's kernels, on the stream they are given."""

    def __init__(self, program: Program, device: torch.device) -> None:
        from skipkernels.kernels.triton import TRITON

        self._runs = [(TRITON[ins.op], ins) for ins in program]
        self._device = device

    def launch(self, index: int, stream: int, programmatic: bool) -> None:
        run, ins = self._runs[index]
        with torch.cuda.stream(torch_stream(stream, self._device)):
            run(ins)

    def launch_in_step(self, index: int, stream: int, programmatic: bool) -> bool:
        self.launch(index, stream, programmatic)
        return True


class NativeGraph:
    """A graph captured by the extension (csrc/cuda/graph.h)."""

    def __init__(self, native: ModuleType, device: int) -> None:
        self._graph = native.CudaGraph(device)

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
    def if_any(self, row_mask: torch.Tensor) -> Iterator[None]:
        self._graph.begin_if(row_mask.data_ptr(), row_mask.numel())
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
        # torch's own side stream is one for all graphs, on the device that was current when the first was captured
        side = torch.cuda.Stream(self._device)
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"),
        ):
            yield

    @contextmanager
    def if_any(self, row_mask: torch.Tensor) -> Iterator[None]:
        self._graph.begin_capture_to_if_node(row_mask.any())
        yield
        self._graph.end_capture_to_conditional_node()

    def while_any(self, active: torch.Tensor) -> AbstractContextManager[None]:
        raise DeviceError("torch captures no WHILE nodes; use loop 'replay'")

    def set_steps(self, steps: int, stream: int) -> None:
        raise DeviceError("torch captures no WHILE nodes; use loop 'replay'")

    def launch(self, stream: int) -> None:
        with torch.cuda.stream(torch_stream(stream, self._device)):
            self._graph.replay()
