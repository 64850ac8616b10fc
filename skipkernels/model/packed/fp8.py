"""Fp8: how DeepSeek's and Qwen's checkpoints, and transformers' own fp8 ones, lay out a linear layer."""

from __future__ import annotations

from skipkernels.model.packed.float8_matrix import Float8Matrix
from skipkernels.model.packed.packed_module import PackedModule
from skipkernels.model.packed.settings import Settings, tile_size
from skipkernels.model.shards import FLOATS, ExpectedTensor

FP8 = "F8_E4M3"
_SCALES = ("weight_scale_inv", "weight_scale")
_INPUTS = ("input_scale", "input_zero_point", "activation_scale")
ACTIVATIONS = "config.json asks for activations in {}; weights alone are read so, activations are not rounded to that"


class Fp8:
    """weight f8_e4m3 [rows, columns]; weight_scale_inv or weight_scale, by which it is multiplied: of tiles of
    ``weight_block_size`` [row tiles, column tiles], or [1], or [rows, 1].

    Raises:
        ModelError: settings that are not read.
    """

    notes: tuple[str, ...] = (ACTIVATIONS.format("fp8"),)

    def __init__(self, settings: Settings) -> None:
        by_tile = settings.get("weight_block_size") is not None
        self._tile = tile_size(settings, "weight_block_size") if by_tile else None

    def packs(self, module: PackedModule) -> bool:
        return module.holds(*_SCALES) or ("weight" in module.held and module.held["weight"].dtype == FP8)

    def tensors(self, module: PackedModule) -> dict[str, ExpectedTensor]:
        name = next((name for name in _SCALES if module.holds(name)), _SCALES[0])
        possible = scale_shapes(module, self._tile)
        held = module.held[name].shape if name in module.held else possible[0]
        expected = {
            "weight": ExpectedTensor((FP8,), (module.rows, module.columns)),
            name: ExpectedTensor(FLOATS, held if held in possible else possible[0]),
        }
        return expected | of_activations(module)

    def matrix(self, module: PackedModule) -> Float8Matrix:
        name = next(name for name in _SCALES if module.holds(name))
        return float8_matrix(module, name, self._tile)


def of_activations(module: PackedModule) -> dict[str, ExpectedTensor]:
    """What is there of activations, whatever its shape: it is not read."""
    return {name: ExpectedTensor((held.dtype,), held.shape) for name, held in module.held.items() if name in _INPUTS}


def scale_shapes(module: PackedModule, tile: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """What shapes the scales of a matrix of floats may have."""
    if tile is not None:
        return [(-(-module.rows // tile[0]), -(-module.columns // tile[1])), (), (1,)]
    return [(module.rows, 1), (module.rows,), (), (1,), (1, 1)]


def float8_matrix(module: PackedModule, scale: str, tile: tuple[int, int] | None) -> Float8Matrix:
    """The matrix whose scales lie in tensor ``scale``, in one of ``scale_shapes``."""
    scales = module.read(scale)
    if scales.numel() == 1:
        tile = module.rows, module.columns
    elif tile is None:
        tile = 1, module.columns
    scales = scales.reshape(-(-module.rows // tile[0]), -1)
    return Float8Matrix(module.name, module.columns, scales, tile, lambda: module.read("weight"))
