"""Launch: one kernel launch with its arguments, the same for running a kernel and for compiling it without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skipkernels.program.table import Instruction


@dataclass(frozen=True)
class Launch:
    """``kernel[grid](**arguments, **options)`` on the current device and stream."""

    kernel: Any  # triton.JITFunction, or its interpreted twin
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int | bool]

    @classmethod
    def of(
        cls,
        kernel: Any,
        ins: Instruction,
        grid: tuple[int, ...],
        blocks: dict[str, int],
        *,
        num_warps: int = 4,
        fuse_multiply_add: bool = True,
    ) -> Launch:
        """Binds a kernel's parameters by name: to ``blocks``, or to the instruction's operands, sizes and ``row_mask``.

        ``fuse_multiply_add=False`` rounds every operation, for arithmetic that must give the reference's bits.
        """
        operands = {**ins.sizes, **ins.tensors, **ins.scalars, "row_mask": ins.row_mask, **blocks}
        arguments = {name: operands[name] for name in kernel.arg_names}
        return cls(kernel, grid, arguments, {"num_warps": num_warps, "enable_fp_fusion": fuse_multiply_add})

    def __call__(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)
