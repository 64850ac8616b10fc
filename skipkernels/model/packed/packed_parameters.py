"""PackedParameters: the parameters of a Hugging Face checkpoint whose matrices, or some of them, are packed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig
from skipkernels.model.float_parameters import FloatParameters
from skipkernels.model.matrix import Matrix
from skipkernels.model.packed.methods import layout_of
from skipkernels.model.packed.packed_module import PackedModule
from skipkernels.model.packed.settings import Settings
from skipkernels.model.shards import Shards, StoredTensor
from skipkernels.model.stacked_experts import StackedExperts
from skipkernels.model.weights import stacks_experts

logger = logging.getLogger(__name__)

_WEIGHT = ".weight"


class PackedParameters(FloatParameters):
    """What lies in ``shards`` of each of ``shapes``. Whether a layer is packed is what its tensors are: the lists of
    layers that ``settings`` (a ``quantization_config``) leaves out or names add nothing to that.

    Raises:
        ModelError: a method or variant that is not read, a tensor that is missing, of another shape or dtype than the
            settings say, or of unknown meaning. Reads headers, and biases that the model has not.
    """

    def __init__(
        self, shards: Shards, config: ModelConfig, settings: Settings, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__(str(shards.path), config, shards.tensor)
        if config.num_experts:
            raise ModelError(
                f"{self.source}: {config.model_type} has experts, which are not read from packed checkpoints"
            )
        self._shards, self._layout = shards, layout_of(settings)
        self._held = _by_layer(shards.headers())
        self._packed = {name: module for name, shape in shapes.items() if (module := self._module(name, shape))}
        if not self._packed:
            raise ModelError(
                f"{self.source}: config.json has a quantization_config ({settings.get('quant_method')}), and no matrix "
                "is quantised so; remove the entry, or give the files that belong to it"
            )
        self._formats: dict[str, str] = {}
        self._counted: set[str] = set()
        self._told_of_scales = False
        expected = {
            f"{module.name}.{own}": stored
            for module in self._packed.values()
            for own, stored in self._layout.tensors(module).items()
        }
        floats = {name: shape for name, shape in shapes.items() if name not in self._packed}
        spare = self._spare_biases(shapes)
        shards.check(floats | spare, config.num_hidden_layers, expected)
        for name in spare:
            if shards.tensor(name).any():
                raise ModelError(f"{self.source}: {name!r} is no zero, and {config.model_type} has no such bias")
        for note in self._layout.notes:
            logger.warning("%s: %s", self.source, note)

    def format(self, name: str) -> str:
        if name not in self._formats:
            module = self._packed.get(name)
            self._formats[name] = super().format(name) if module is None else self._layout.matrix(module).format()
        return self._formats[name]

    def blocks(self, name: str) -> Matrix:
        matrix = self._layout.matrix(self._packed[name])
        if matrix.rounds_scales() and not self._told_of_scales:
            self._told_of_scales = True
            logger.warning("%s: scales are rounded to fp16, which moves a weight by at most 1/2048 of it", self.source)
        return matrix.blocks()

    def copy_floats(self, name: str, target: torch.Tensor) -> None:
        if name in self._packed:
            self._layout.matrix(self._packed[name]).copy_floats(target)
        else:
            super().copy_floats(name, target)

    def _module(self, name: str, shape: tuple[int, ...]) -> PackedModule | None:
        """The layer of a matrix, where it is packed."""
        if len(shape) != 2 or not name.endswith(_WEIGHT):
            return None
        layer = name.removesuffix(_WEIGHT)
        module = PackedModule(layer, *shape, self._held.get(layer, {}), lambda own: self._read_once(f"{layer}.{own}"))
        return module if self._layout.packs(module) else None

    def _spare_biases(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Old tools wrote a bias of zeros for every layer that they packed."""
        return {
            bias: (module.rows,)
            for module in self._packed.values()
            if module.holds("bias") and (bias := f"{module.name}.bias") not in shapes
        }

    def _read_once(self, name: str) -> torch.Tensor:
        """A tensor of a packed layer; it counts among the contents when it is first read."""
        tensor = self._shards.tensor(name)
        if name not in self._counted:
            self._counted.add(name)
            self._hash.add(name, tensor)
        return tensor


def shard_parameters(
    shards: Shards, config: ModelConfig, settings: Settings | None, shapes: Mapping[str, tuple[int, ...]]
) -> FloatParameters:
    """What lies in ``shards``, packed as ``settings`` say; None: floats.

    Raises:
        ModelError: the files do not hold what they should.
    """
    if stacks_experts(config) and (settings is None or settings.get("quant_method") == "mxfp4"):
        return StackedExperts(shards, config)
    if settings is not None:
        return PackedParameters(shards, config, settings, shapes)
    shards.check(shapes, config.num_hidden_layers)
    return FloatParameters(str(shards.path), config, shards.tensor)


def _by_layer(headers: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Layer -> the names of its tensors without the layer's, and what they are."""
    held: dict[str, dict[str, StoredTensor]] = {}
    for name, stored in headers.items():
        layer, _, own = name.rpartition(".")
        held.setdefault(layer, {})[own] = stored
    return held
