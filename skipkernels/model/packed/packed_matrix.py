"""PackedMatrix: what a method's tensors of one layer stand for. PackedLayout: how a method lays them out."""

from __future__ import annotations

from typing import Protocol

import torch

from skipkernels.model.matrix import Matrix
from skipkernels.model.packed.packed_module import PackedModule
from skipkernels.model.shards import ExpectedTensor


class PackedMatrix(Protocol):
    """One matrix, read when it is asked for."""

    def format(self) -> str:
        """One of ``BLOCK_FORMATS`` that holds its values, or what it is, where none does."""

    def blocks(self) -> Matrix:
        """The matrix in blocks of ``format()``."""

    def rounds_scales(self) -> bool:
        """Whether blocks hold scales rounded to fp16."""

    def copy_floats(self, target: torch.Tensor) -> None:
        """Writes its values into ``target`` [rows, columns] of any float dtype."""


class PackedLayout(Protocol):
    """One method with the settings of one checkpoint."""

    notes: tuple[str, ...]
    """What the checkpoint asks for and is not done, each to be told in a line."""

    def packs(self, module: PackedModule) -> bool:
        """Whether the layer's tensors are this method's; else its weights are floats."""

    def tensors(self, module: PackedModule) -> dict[str, ExpectedTensor]:
        """What must be there of a layer, by names without the layer's.

        Raises:
            ModelError: the method cannot pack a matrix of this shape as the settings say.
        """

    def matrix(self, module: PackedModule) -> PackedMatrix:
        """The layer's matrix; reads all but its levels."""
