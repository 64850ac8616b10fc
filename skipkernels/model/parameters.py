"""Parameters: what every kind of checkpoint is to those who pack weights, whatever its files are called."""

from __future__ import annotations

from typing import Protocol

import torch

from skipkernels.model.matrix import Matrix


class Parameters(Protocol):
    """A checkpoint's parameters by Hugging Face's names, with their rows in Hugging Face's order."""

    @property
    def source(self) -> str:
        """Where they lie, for messages."""

    def format(self, name: str) -> str:
        """One of ``BLOCK_FORMATS`` or ``FLOAT_FORMATS``; another: only ``copy_floats`` can read it."""

    def blocks(self, name: str) -> Matrix:
        """A matrix of one of ``BLOCK_FORMATS`` as it is stored."""

    def copy_floats(self, name: str, target: torch.Tensor) -> None:
        """Writes the values of a parameter into ``target``, of its shape and any float dtype."""

    def contents(self) -> str:
        """A hash over samples of all parameters that were read, 16 hex digits."""
