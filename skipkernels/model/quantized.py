"""QuantizedParameters: a checkpoint's parameters with its matrices quantised while they are read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

import torch

from skipkernels.model.block_quantizer import quantize
from skipkernels.model.matrix import FLOAT_FORMATS, Matrix
from skipkernels.model.parameters import Parameters

logger = logging.getLogger(__name__)


class QuantizedParameters:
    """``parameters`` with the matrices named in ``formats`` in those block formats. Blocks that a file already holds
    in the format wanted are taken as they are; those in another are rounded a second time, which is logged.
    """

    def __init__(
        self, parameters: Parameters, formats: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._parameters, self._formats, self._shapes = parameters, formats, shapes
        twice = Counter(self._from_blocks(name) for name in formats)
        del twice[""]
        for what, count in twice.items():
            logger.warning(
                "%s: %d matrices were quantised before and are rounded a second time, from %s; quantising the model's "
                "original weights loses less",
                self.source,
                count,
                what,
            )

    @property
    def source(self) -> str:
        return self._parameters.source

    def format(self, name: str) -> str:
        return self._formats.get(name) or self._parameters.format(name)

    def blocks(self, name: str) -> Matrix:
        if self._parameters.format(name) == self._formats.get(name, self._parameters.format(name)):
            return self._parameters.blocks(name)
        rows, columns = self._shapes[name]
        values = torch.empty(rows, columns)
        self._parameters.copy_floats(name, values)
        return quantize(values, self._formats[name])

    def copy_floats(self, name: str, target: torch.Tensor) -> None:
        self._parameters.copy_floats(name, target)

    def contents(self) -> str:
        return self._parameters.contents()

    def _from_blocks(self, name: str) -> str:
        held, wanted = self._parameters.format(name), self._formats[name]
        return f"{held} to {wanted}" if held not in FLOAT_FORMATS and held != wanted else ""
