"""Execution: on what and how a program is run, as asked for, and as resolved on this machine."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from skipkernels.errors import DeviceError
from skipkernels.executors.support import CudaSupport
from skipkernels.support.machine import MAX_THREADS

logger = logging.getLogger(__name__)

EXECUTORS = ("auto", "cpu", "reference", "graph")
KERNELS = ("auto", "cuda", "triton")
CONDITIONALS = ("auto", "predicate", "if_node")
LOOPS = ("auto", "replay", "while")


@dataclass(frozen=True)
class Execution:
    """How to run. ``auto`` leaves the choice to ``resolved``.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        executor: ``cpu`` or ``reference`` on the cpu, ``graph`` on cuda.
        num_threads: threads of the cpu executor; None: all processors that may be used, or as many as torch has.
        kernels: the kernel set of the graph executor, ``cuda`` or ``triton``.
        conditional: how a graph leaves out a skipped FFN: ``predicate`` (its kernels exit at once) or ``if_node``.
        loop: how a graph becomes a generation: ``replay`` (steps are enqueued ahead of the host) or ``while`` (one
            launch decodes until every row is done).
        debug: no graph; the device is waited for after every instruction, so that an error names its instruction.

    Raises:
        DeviceError: an unknown name, or options that exclude each other.
    """

    device: str = "cpu"
    executor: str = "auto"
    num_threads: int | None = None
    kernels: str = "auto"
    conditional: str = "auto"
    loop: str = "auto"
    debug: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("executor", EXECUTORS),
            ("kernels", KERNELS),
            ("conditional", CONDITIONALS),
            ("loop", LOOPS),
        ):
            if (value := getattr(self, name)) not in known:
                raise DeviceError(f"unknown {name} {value!r}; use one of {', '.join(known)}")
        kind, colon, index = self.device.partition(":")
        if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not index.isdecimal())):
            raise DeviceError(f"unknown device {self.device!r}; use 'cpu', 'cuda' or 'cuda:N'")
        if self.num_threads is not None and self.num_threads < 1:
            raise DeviceError(f"num_threads must be at least 1, got {self.num_threads}")
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise DeviceError(f"num_threads must be at most {MAX_THREADS}, got {self.num_threads}")
        if self.executor != "auto" and self.on_gpu != (self.executor == "graph"):
            raise DeviceError(
                f"the {self.executor} executor does not run on device {self.device!r}; "
                "cpu and reference run on 'cpu', graph on 'cuda'"
            )
        for name in ("kernels", "conditional", "loop"):
            if not self.on_gpu and getattr(self, name) != "auto":
                raise DeviceError(f"{name}={getattr(self, name)!r} is for device 'cuda', got device {self.device!r}")
        if self.debug and not self.on_gpu:
            raise DeviceError(f"debug is for device 'cuda', got device {self.device!r}")

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def resolved(self, support: CudaSupport | None = None) -> Execution:
        """Without ``auto``, for this machine (or for ``support``); logged.

        Raises:
            DeviceError: what was asked for is not usable here, and why.
        """
        if not self.on_gpu:
            return replace(self, executor="cpu" if self.executor == "auto" else self.executor)
        support = support or CudaSupport.probe(self.device)
        if support.device:
            raise DeviceError(f"device {self.device!r} is not usable: {support.device}")
        kernels = self.kernels
        if kernels == "auto":
            kernels = next((name for name, missing in support.kernels.items() if not missing), "cuda")
        if missing := support.kernels[kernels]:
            raise DeviceError(f"kernels {kernels!r} are not usable: {missing}")
        # not measured yet which is faster; these two need nothing beyond CUDA graphs
        conditional = "predicate" if self.conditional == "auto" else self.conditional
        if conditional == "if_node" and (missing := support.if_node):
            raise DeviceError(f"conditional 'if_node' is not usable: {missing}; use conditional 'predicate'")
        loop = "replay" if self.loop == "auto" else self.loop
        if loop == "while" and (missing := support.while_node):
            raise DeviceError(f"loop 'while' is not usable: {missing}; use loop 'replay'")
        chosen = replace(self, executor="graph", kernels=kernels, conditional=conditional, loop=loop)
        logger.info("executor graph: %s, kernels %s, %s, %s", self.device, kernels, conditional, loop)
        return chosen
