"""PackedModule: the tensors of one linear layer whose matrix a quantisation method packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from skipkernels.model.shards import StoredTensor


@dataclass(frozen=True)
class PackedModule:
    """A layer's name, the shape of its matrix, and what the files hold of it by their names without the layer's."""

    name: str
    rows: int
    columns: int
    held: Mapping[str, StoredTensor]
    read: Callable[[str], torch.Tensor]
    """A tensor of ``held``, mapped."""

    def holds(self, *names: str) -> bool:
        """Whether one of these tensors is there."""
        return not self.held.keys().isdisjoint(names)
