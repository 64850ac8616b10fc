"""The kernels of csrc/cuda, compiled for the CPU, as an executor of single instructions."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from skipkernels.executors.native import native_program
from skipkernels.program import Program
from skipkernels.program.state import DecodeState
from tests.cuda_host.build import (
    PYTHON_HEADERS,
    ROOT,
    SKIPKERNELS_HEADERS,
    build_host_extension,
    load_module,
)
from tests.cuda_host.controls import HostRuntime

KERNELS = ROOT / "csrc" / "cuda"
SOURCES = [*sorted(path for path in KERNELS.glob("*.cu") if path.stem != "condition")]
SOURCES += [KERNELS / "kernels.cpp", KERNELS / "plan.cpp"]


def build(*, sanitize: bool = False, races: bool = False) -> Path:
    return build_host_extension(
        [*SOURCES, Path(__file__).with_name("module.cpp")],
        name="kernels.so",
        sanitize=sanitize,
        races=races,
        flags=[SKIPKERNELS_HEADERS],
        cpp_flags=PYTHON_HEADERS,
    )


@cache
def load(*, sanitize: bool = False, races: bool = False) -> tuple[ModuleType, HostRuntime]:
    library = build(sanitize=sanitize, races=races)
    return load_module(f"cuda_kernels_{library.parent.name}.kernels", library), HostRuntime(library)


class HostKernels:
    """Runs a program's instructions with the CUDA kernels, their threads scheduled by ``seed``."""

    name = "cuda kernels on the CPU"

    def __init__(
        self,
        program: Program,
        state: DecodeState,
        *,
        seed: int = 0,
        num_sms: int = 3,
        races: bool = False,
        broken: str = "",
        **options: bool,
    ) -> None:
        """``options``: switches of csrc/cuda/plan.h; ``broken``: how the plan of a step is to be made wrong."""
        module, self.runtime = load(races=races)
        self.runtime.reset(seed=seed)
        self._kept = program, state
        self._native = module.Kernels(native_program(program, state), num_sms, options)
        self._native.break_plan(broken)

    def run_instruction(self, index: int) -> None:
        self._checked(lambda: self._native.launch(index))

    def run_overlapped(self) -> None:
        """The whole program; each kernel may start before the one before it has ended."""
        self._checked(self._native.launch_overlapped)

    @property
    def stamps(self) -> torch.Tensor:
        """[instructions, 3] of the overlapped run: first block, first wait over, last end; -1 where none was taken."""
        return torch.tensor(self._native.stamps(), dtype=torch.uint64).view(torch.int64).view(-1, 3)

    def _checked(self, launch) -> None:  # type: ignore[no-untyped-def]
        try:
            launch()
        except RuntimeError as error:
            raise AssertionError(self.runtime.failure or str(error)) from error
        assert not self.runtime.failure, self.runtime.failure
        assert self._native.arrivals_are_zero()
