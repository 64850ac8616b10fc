"""CompressedTensors: how the compressed-tensors package (llm-compressor's, and vLLM's) lays out a linear layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from skipkernels.errors import ModelError
from skipkernels.model.packed.float8_matrix import Float8Matrix
from skipkernels.model.packed.fp8 import ACTIVATIONS, FP8, float8_matrix, of_activations, scale_shapes
from skipkernels.model.packed.integer_matrix import IntegerMatrix
from skipkernels.model.packed.packed_ints import unpacked
from skipkernels.model.packed.packed_module import PackedModule
from skipkernels.model.packed.settings import Settings, group_size, refuse, tile_size, whole_number
from skipkernels.model.shards import FLOATS, ExpectedTensor

METHOD = "compressed-tensors"
_SUPPORTED = (
    "formats pack-quantized (int 4 and 8 bits by tensor, channel or group), int-quantized, float-quantized and "
    "naive-quantized (int and float 8 bits, floats also by block), activations of 8 or more bits"
)
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = {"int": ("tensor", "channel", "group"), "float": ("tensor", "channel", "block")}
_EMBEDDINGS = "model.embed_tokens"


@dataclass(frozen=True)
class _Scheme:
    """What one of ``config_groups`` says of weights, and of which layers."""

    targets: tuple[str, ...]
    kind: str  # int or float
    bits: int
    strategy: str
    group_size: int
    tile: tuple[int, int] | None

    def covers(self, module: str) -> int:
        """How exactly a layer is meant, the least number first; 3: not at all."""
        if module in self.targets:
            return 0
        if any(_matches(target.removeprefix("re:"), module) for target in self.targets if target.startswith("re:")):
            return 1
        return 2 if ("Embedding" if module == _EMBEDDINGS else "Linear") in self.targets else 3


_STATUSES = ("compressed", "frozen")
"""Older releases of the package left the second in what they saved; the tensors say that they are compressed."""


class CompressedTensors:
    """weight_packed i32 [rows, columns / n], n levels a word, or weight [rows, columns] of eight bits; weight_scale
    [1], [rows, 1], [rows, groups] or [row tiles, column tiles]; weight_zero_point of integers, of the scale's shape or
    packed along rows; weight_g_idx i32 [columns], the group of each column in act-order.

    Raises:
        ModelError: settings that are not read.
    """

    def __init__(self, settings: Settings) -> None:
        for entry in ("kv_cache_scheme", "transform_config"):
            if settings.get(entry):
                raise refuse(METHOD, entry, _SUPPORTED)
        sparsity = settings.get("sparsity_config") or {}
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            raise refuse(METHOD, f"sparsity of format {sparsity.get('format')!r}", _SUPPORTED)
        if (status := settings.get("quantization_status", "compressed")) not in _STATUSES:
            raise refuse(METHOD, f"quantization_status {status!r}", " and ".join(_STATUSES))
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
            raise ModelError(f"quantization_config: config_groups must hold schemes, got {groups!r}")
        self._schemes = [_scheme(group, settings.get("format")) for group in groups.values()]
        asked = (_activations(group) for group in groups.values())
        self.notes = tuple(dict.fromkeys(ACTIVATIONS.format(kind) for kind in asked if kind))

    def packs(self, module: PackedModule) -> bool:
        return module.holds("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")

    def tensors(self, module: PackedModule) -> dict[str, ExpectedTensor]:
        scheme = self._scheme_of(module)
        shapes = _scale_shapes(scheme, module)
        held = module.held["weight_scale"].shape if module.holds("weight_scale") else shapes[0]
        scale = held if held in shapes else shapes[0]
        expected = {"weight_scale": ExpectedTensor(FLOATS, scale)} | of_activations(module)
        if not module.holds("weight"):
            words = -(-module.columns * scheme.bits // 32)
            expected["weight_packed"] = ExpectedTensor(("I32",), (module.rows, words))
        else:
            expected["weight"] = ExpectedTensor(
                (FP8 if scheme.kind == "float" else "I8",), (module.rows, module.columns)
            )
        if module.holds("weight_shape"):
            expected["weight_shape"] = ExpectedTensor(("I64", "I32"), (2,))
        if module.holds("weight_g_idx"):
            expected["weight_g_idx"] = ExpectedTensor(("I32",), (module.columns,))
        if module.holds("weight_zero_point"):
            packed = module.held["weight_zero_point"].dtype == "I32"
            rows = -(-module.rows * scheme.bits // 32)
            shape = (rows, *scale[1:]) if packed else scale
            expected["weight_zero_point"] = ExpectedTensor(("I32",) if packed else ("I8", FP8), shape)
        return expected

    def matrix(self, module: PackedModule) -> IntegerMatrix | Float8Matrix:
        scheme = self._scheme_of(module)
        self._check_shape(module)
        if scheme.kind == "float":
            return float8_matrix(module, "weight_scale", scheme.tile)
        scales = _by_group(scheme, module.read("weight_scale")).expand(module.rows, -1)
        zeros, groups = _zeros(scheme, module).expand(scales.shape), _groups(scheme, module)
        return IntegerMatrix(module.name, scheme.bits, scales, zeros, groups, _levels(scheme, module))

    def _scheme_of(self, module: PackedModule) -> _Scheme:
        scheme = min(self._schemes, key=lambda each: each.covers(module.name))
        if scheme.covers(module.name) == 3:
            raise ModelError(
                f"{module.name}: holds {', '.join(sorted(module.held))}, and no target of quantization_config's "
                "config_groups covers it"
            )
        return scheme

    def _check_shape(self, module: PackedModule) -> None:
        if not module.holds("weight_shape"):
            return
        shape = tuple(module.read("weight_shape").tolist())
        if shape != (module.rows, module.columns):
            raise ModelError(
                f"{module.name}: weight_shape holds {list(shape)}, expected {[module.rows, module.columns]}"
            )


def _scheme(group: dict[str, Any], format: str | None) -> _Scheme:
    weights, targets = group.get("weights"), group.get("targets")
    format = group.get("format") or format
    if format not in _FORMATS:
        raise refuse(METHOD, f"format {format!r}", _SUPPORTED)
    if not isinstance(weights, dict) or not isinstance(targets, list):
        raise ModelError(f"quantization_config: a group of config_groups has targets {targets!r}, weights {weights!r}")
    kind, bits = str(weights.get("type", "int")), whole_number(weights, "num_bits", default=8)
    allowed = (4, 8) if format == "pack-quantized" else (8,)
    if kind not in _STRATEGIES or bits not in allowed or (kind == "float" and format == "pack-quantized"):
        raise refuse(METHOD, f"weights of type {kind} and {bits} bits in format {format}", _SUPPORTED)
    size = group_size(weights, "group_size") if weights.get("group_size") is not None else -1
    strategy = weights.get("strategy") or ("group" if size > 0 else "channel" if "group_size" in weights else "tensor")
    if strategy not in _STRATEGIES[kind] or (strategy == "group" and size < 1):
        raise refuse(METHOD, f"weights of type {kind} by {strategy}, group_size {size}", _SUPPORTED)
    tile = tile_size(weights, "block_structure") if strategy == "block" else None
    return _Scheme(tuple(map(str, targets)), kind, bits, strategy, size, tile)


def _activations(group: dict[str, Any]) -> str:
    """To what a group rounds activations, such as fp8; empty: to nothing."""
    if group.get("output_activations"):
        raise refuse(METHOD, "output_activations", _SUPPORTED)
    asked = group.get("input_activations")
    if not asked:
        return ""
    bits, kind = whole_number(asked, "num_bits", default=8), str(asked.get("type", "int"))
    if bits < 8:
        raise refuse(METHOD, f"activations of {bits} bits", _SUPPORTED)
    return f"{'fp' if kind == 'float' else kind}{bits}"


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise ModelError(f"quantization_config: target 're:{pattern}' is no pattern ({error})") from error


def _scale_shapes(scheme: _Scheme, module: PackedModule) -> list[tuple[int, ...]]:
    """The shapes that the scales may have, the usual one first."""
    if scheme.kind == "float":
        return scale_shapes(module, scheme.tile)
    if scheme.strategy == "tensor":
        return [(1,), (), (1, 1)]
    if scheme.strategy == "channel":
        return [(module.rows, 1), (module.rows,)]
    if module.columns % scheme.group_size:
        raise ModelError(
            f"{module.name}: quantization_config's group_size {scheme.group_size} does not divide its {module.columns} "
            "columns"
        )
    return [(module.rows, module.columns // scheme.group_size)]


def _groups(scheme: _Scheme, module: PackedModule) -> torch.Tensor:
    """The group of each column."""
    if scheme.strategy != "group":
        return torch.zeros(module.columns, dtype=torch.long)
    groups = module.columns // scheme.group_size
    if not module.holds("weight_g_idx"):
        return torch.arange(module.columns) // scheme.group_size
    listed = module.read("weight_g_idx").long()
    if (listed < 0).any() or (listed >= groups).any():
        raise ModelError(f"{module.name}: weight_g_idx must hold groups 0..{groups - 1}, got {int(listed.max())}")
    return listed


def _zeros(scheme: _Scheme, module: PackedModule) -> torch.Tensor:
    """i16 [rows, groups], or one for all: levels are stored so that half of them are negative."""
    middle = 1 << (scheme.bits - 1)
    if not module.holds("weight_zero_point"):
        return torch.tensor([[middle]], dtype=torch.int16)
    stored = module.read("weight_zero_point")
    if stored.dtype == torch.int32:
        return unpacked(stored.T, scheme.bits)[:, : module.rows].T.short()
    return _by_group(scheme, stored).short() + middle


def _by_group(scheme: _Scheme, stored: torch.Tensor) -> torch.Tensor:
    """One number for all, one for each row, or one for each row of each group -> [1 or rows, groups]."""
    return stored if scheme.strategy == "group" else stored.reshape(-1, 1)


def _levels(scheme: _Scheme, module: PackedModule) -> Callable[[], torch.Tensor]:
    if module.holds("weight_packed"):
        return lambda: unpacked(module.read("weight_packed"), scheme.bits)[:, : module.columns]
    return lambda: (module.read("weight").short() + 128).to(torch.uint8)
