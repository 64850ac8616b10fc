"""Awq: how AutoAWQ lays out a linear layer for its GEMM kernels."""

from __future__ import annotations

import torch

from skipkernels.errors import ModelError
from skipkernels.model.packed.integer_matrix import IntegerMatrix
from skipkernels.model.packed.packed_ints import unpacked
from skipkernels.model.packed.packed_module import PackedModule
from skipkernels.model.packed.settings import Settings, group_size, refuse, whole_number
from skipkernels.model.shards import FLOATS, ExpectedTensor

_SUPPORTED = "4 bits, version gemm, with zero points"
_BITS, _PER_WORD = 4, 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight neighbouring rows lies, counted from its lowest bits."""


class Awq:
    """qweight i32 [columns, rows / 8]; qzeros i32 [groups, rows / 8]; scales [groups, rows].

    Raises:
        ModelError: settings that are not read.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, settings: Settings) -> None:
        if (bits := whole_number(settings, "bits", "w_bit", default=_BITS)) != _BITS:
            raise refuse("awq", f"{bits} bits", _SUPPORTED)
        version = str(settings.get("version") or settings.get("format") or "gemm").lower()
        if settings.get("backend") == "llm-awq":
            version = "llm-awq"
        if version != "gemm":
            raise refuse("awq", f"version {version!r}", _SUPPORTED)
        if not settings.get("zero_point", True):
            raise refuse("awq", "zero_point false", _SUPPORTED)
        self._group_size = group_size(settings, "group_size", "q_group_size")

    def packs(self, module: PackedModule) -> bool:
        return module.holds("qweight", "qzeros", "scales")

    def tensors(self, module: PackedModule) -> dict[str, ExpectedTensor]:
        size = self._size(module)
        if module.columns % size or module.rows % _PER_WORD:
            raise ModelError(
                f"{module.name}: {module.rows} rows of {module.columns} columns cannot be packed in groups of {size} "
                f"columns and words of {_PER_WORD} rows, as quantization_config says"
            )
        groups, words = module.columns // size, module.rows // _PER_WORD
        return {
            "qweight": ExpectedTensor(("I32",), (module.columns, words)),
            "qzeros": ExpectedTensor(("I32",), (groups, words)),
            "scales": ExpectedTensor(FLOATS, (groups, module.rows)),
        }

    def matrix(self, module: PackedModule) -> IntegerMatrix:
        def levels() -> torch.Tensor:
            return _in_order(module.read("qweight")).T.contiguous()

        zeros = _in_order(module.read("qzeros")).T.short()
        groups = torch.arange(module.columns) // self._size(module)
        return IntegerMatrix(module.name, _BITS, module.read("scales").T, zeros, groups, levels)

    def _size(self, module: PackedModule) -> int:
        return module.columns if self._group_size == -1 else self._group_size


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """i32 [n, rows / 8] -> u8 [n, rows]."""
    return unpacked(words, _BITS).unflatten(1, (-1, _PER_WORD))[:, :, list(_PLACES)].flatten(1)
