"""Gptq: how GPTQ's tools lay out a linear layer (AutoGPTQ's first version, and ``gptq_v2``)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from skipkernels.errors import ModelError
from skipkernels.model.packed.integer_matrix import IntegerMatrix
from skipkernels.model.packed.packed_ints import unpacked
from skipkernels.model.packed.packed_module import PackedModule
from skipkernels.model.packed.settings import Settings, group_size, refuse, whole_number
from skipkernels.model.shards import FLOATS, ExpectedTensor

_SUPPORTED = "4 and 8 bits, checkpoint_format gptq and gptq_v2"
_BITS = (4, 8)


@dataclass(frozen=True)
class _Packing:
    """The settings of one layer."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool

    @property
    def per_word(self) -> int:
        return 32 // self.bits


class Gptq:
    """qweight i32 [columns / n, rows], n levels of neighbouring columns a word; qzeros i32 [groups, rows / n]; scales
    [groups, rows]; g_idx i32 [columns], the group of each column. In the first version zeros are stored less 1.

    Raises:
        ModelError: settings that are not read.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, settings: Settings) -> None:
        version = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if settings.get("is_marlin_format"):
            version = "marlin"
        if version not in ("gptq", "gptq_v2"):
            raise refuse("gptq", f"checkpoint_format {version!r}", _SUPPORTED)
        self._zero_offset = 1 if version == "gptq" else 0
        self._settings = settings
        self._version = version
        self._dynamic = _patterns(settings.get("dynamic") or {})
        self._packing("")

    def packs(self, module: PackedModule) -> bool:
        return module.holds("qweight", "qzeros", "scales", "g_idx")

    def tensors(self, module: PackedModule) -> dict[str, ExpectedTensor]:
        packing = self._packing(module.name)
        groups = self._groups(packing, module)
        expected = {
            "qweight": ExpectedTensor(("I32",), (-(-module.columns // packing.per_word), module.rows)),
            "qzeros": ExpectedTensor(("I32",), (groups, -(-module.rows // packing.per_word))),
            "scales": ExpectedTensor(FLOATS, (groups, module.rows)),
        }
        if module.holds("g_idx") or packing.act_order:
            expected["g_idx"] = ExpectedTensor(("I32",), (module.columns,))
        return expected

    def matrix(self, module: PackedModule) -> IntegerMatrix:
        packing = self._packing(module.name)
        zeros = unpacked(module.read("qzeros"), packing.bits)[:, : module.rows].T.short() + self._zero_offset
        middle = 1 << (packing.bits - 1)
        if packing.symmetric and (zeros != middle).any():
            raise ModelError(
                f"{module.name}: quantization_config says sym, so that zeros are {middle}, and checkpoint_format "
                f"{self._version}, by which qzeros holds others, such as {int(zeros[zeros != middle][0])}"
            )

        def levels() -> torch.Tensor:
            return unpacked(module.read("qweight").T, packing.bits)[:, : module.columns]

        scales = module.read("scales").T
        return IntegerMatrix(module.name, packing.bits, scales, zeros, self._group_of_column(packing, module), levels)

    def _packing(self, module: str) -> _Packing:
        """The settings of a layer: gptqmodel's ``dynamic`` has some of single ones, under +: and a pattern."""
        others = next((entries for pattern, entries in self._dynamic if pattern.match(module)), {})
        own = {**self._settings, **others}
        bits = whole_number(own, "bits")
        if bits not in _BITS:
            raise refuse("gptq", f"{bits} bits", _SUPPORTED)
        return _Packing(bits, group_size(own, "group_size"), bool(own.get("sym")), bool(own.get("desc_act")))

    def _groups(self, packing: _Packing, module: PackedModule) -> int:
        return 1 if packing.group_size == -1 else -(-module.columns // packing.group_size)

    def _group_of_column(self, packing: _Packing, module: PackedModule) -> torch.Tensor:
        groups = self._groups(packing, module)
        if not module.holds("g_idx"):
            return torch.arange(module.columns) // (module.columns if groups == 1 else packing.group_size)
        listed = module.read("g_idx").long()
        if (listed < 0).any() or (listed >= groups).any():
            raise ModelError(f"{module.name}: g_idx must hold groups 0..{groups - 1}, got {int(listed.max())}")
        return listed


def _patterns(dynamic: Settings) -> list[tuple[re.Pattern[str], Settings]]:
    """Patterns of layers' names and the settings that they have of their own; layers under -: hold floats."""
    try:
        return [
            (re.compile(pattern.removeprefix("+:")), dict(entries))
            for pattern, entries in dynamic.items()
            if not pattern.startswith("-:")
        ]
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"quantization_config: dynamic cannot be used ({error})") from error
