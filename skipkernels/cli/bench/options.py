"""Options that the benches share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from skipkernels.cli import options as opt
from skipkernels.support.machine import default_threads

if TYPE_CHECKING:
    from skipkernels.executors.execution import Execution


@dataclass(frozen=True)
class DeviceOptions:
    """The device, and how a GPU is used."""

    threads: opt.Threads = None
    device: opt.Device = "cpu"
    kernels: opt.Kernels = "auto"
    conditional: opt.Conditional = "auto"
    loop: opt.Loop = "auto"

    @property
    def num_threads(self) -> int:
        return self.threads or default_threads()

    def execution(self) -> Execution:
        """The execution with all defaults resolved, for the report."""
        import torch

        from skipkernels.executors.execution import Execution

        torch.set_num_threads(self.num_threads)
        return Execution(
            device=self.device,
            num_threads=self.num_threads,
            kernels=self.kernels,
            conditional=self.conditional,
            loop=self.loop,
        ).resolved()


def numbers(text: str, kind: type[int] | type[float], option: str) -> list[Any]:
    """The numbers of a comma-separated option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{option} takes numbers separated by commas, got {text!r}") from error
