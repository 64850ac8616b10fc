"""FloatParameters: the parameters of a Hugging Face checkpoint or of a loaded module, which are floats."""

from __future__ import annotations

from collections.abc import Callable

import torch

from skipkernels.model.config import ModelConfig
from skipkernels.model.matrix import Matrix, formats_of
from skipkernels.model.weights import as_packed
from skipkernels.skipping.fingerprint import WeightsHash


class FloatParameters:
    """What ``read`` makes of Hugging Face's names, as the packed weights of ``config`` hold it."""

    def __init__(self, source: str, config: ModelConfig, read: Callable[[str], torch.Tensor]) -> None:
        self.source = source
        self._config, self._read, self._hash = config, read, WeightsHash()

    def format(self, name: str) -> str:
        return formats_of(self._read(name))[0]

    def blocks(self, name: str) -> Matrix:
        raise AssertionError(f"{name} holds floats")

    def copy_floats(self, name: str, target: torch.Tensor) -> None:
        tensor = self._read(name)
        self._hash.add(name, tensor)
        target.copy_(as_packed(self._config, name, tensor))

    def contents(self) -> str:
        return self._hash.hexdigest()
