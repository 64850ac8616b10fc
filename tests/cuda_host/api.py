"""The functions of the CUDA runtime that kernels/graph.cu exports, called from Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from tests.cuda_host.controls import HostRuntime, c_argument

NON_BLOCKING, GLOBAL, THREAD_LOCAL, RELAXED, IF, WHILE, ASSIGN_DEFAULT = 1, 0, 1, 2, 0, 1, 1


class Api:
    """``api.cudaFree(p)`` returns the name of its error; ``api.new("cudaMalloc", 16)`` what it writes through its first
    argument, and asserts success."""

    def __init__(self, runtime: HostRuntime) -> None:
        self.runtime = runtime
        runtime.library.api.restype = ctypes.c_void_p

    def __getattr__(self, name: str) -> Callable[..., str]:
        address = self.runtime.library.api(name.encode())
        # what the table does not know is exported under its own name
        function: Any = ctypes.CFUNCTYPE(ctypes.c_int)(address) if address else getattr(self.runtime.library, name)

        def call(*arguments: Any) -> str:
            return self.runtime.error_name(function(*map(c_argument, arguments)))

        return call

    def new(self, name: str, *arguments: Any, first: int | None = None) -> int:
        """``first``: the argument before the one that is written through, if there is one."""
        out = ctypes.c_void_p()
        before = [] if first is None else [first]
        error = getattr(self, name)(*before, ctypes.byref(out), *arguments)
        assert error == "cudaSuccess", f"{name}: {error}"
        return out.value or 0

    def stream(self) -> int:
        return self.new("cudaStreamCreateWithFlags", NON_BLOCKING)

    def begin_capture(self, stream: int, mode: int = GLOBAL) -> None:
        assert self.cudaStreamBeginCapture(stream, mode) == "cudaSuccess"

    def end_capture(self, stream: int) -> int:
        return self.new("cudaStreamEndCapture", first=stream)

    def launch_graph(self, graph: int, stream: int) -> str:
        """Instantiate, launch once, destroy the instance."""
        exec_ = self.new("cudaGraphInstantiate", graph, 0)
        error = self.cudaGraphLaunch(exec_, stream)
        self.cudaGraphExecDestroy(exec_)
        return error
