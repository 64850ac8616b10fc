"""UpScales: how large up_proj's outputs are, neuron by neuron; a policy's gate thresholds are divided by them.

A gate that meets a large output of up_proj must be kept even if it is small. Calibration measures the root mean square
of each neuron's; the weights alone do not tell it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from skipkernels.errors import PolicyError

_STORED = np.dtype("<f2")
"""Enough: a calibration knows a scale to a few per cent, and tunes the threshold that is divided by it."""


@dataclass(frozen=True)
class UpScales:
    """Of a whole model. ``repr`` tells two apart without their numbers, of which an 8B model has 458,752."""

    shape: tuple[int, int]  # layers, intermediate
    digest: str  # of the data
    data: bytes = field(repr=False)  # little-endian float16

    @classmethod
    def of(cls, values: Sequence[Sequence[float]]) -> UpScales:
        """Rounds ``values`` [layers][intermediate] to float16.

        Raises:
            PolicyError: no numbers, layers of different lengths, or a number that is not above 0 in float16.
        """
        rows = [_rounded(layer, row) for layer, row in enumerate(values)]
        for layer, row in enumerate(rows):
            if len(row) != len(rows[0]):
                raise PolicyError(f"up_scales[{layer}] has {len(row)} entries, up_scales[0] {len(rows[0])}")
        data = b"".join(row.tobytes() for row in rows)
        return cls((len(rows), len(rows[0])), blake2b(data, digest_size=16).hexdigest(), data)

    @classmethod
    def decoded(cls, layers: Sequence[object]) -> UpScales:
        """Inverse of ``encoded``.

        Raises:
            PolicyError: a layer is no base64 of float16 numbers, or as for ``of``.
        """
        rows = []
        for layer, text in enumerate(layers):
            try:
                data = base64.b64decode(text, validate=True) if isinstance(text, str) else b"?"
                rows.append(np.frombuffer(data, _STORED))
            except (binascii.Error, ValueError) as error:
                raise PolicyError(f"up_scales[{layer}] must be base64 of little-endian float16 numbers") from error
        return cls.of(rows)  # type: ignore[arg-type]

    @property
    def values(self) -> npt.NDArray[np.float16]:
        """f16 [layers, intermediate]."""
        return np.frombuffer(self.data, _STORED).reshape(self.shape)

    def encoded(self) -> list[str]:
        """One string a layer, for JSON."""
        return [base64.b64encode(row.tobytes()).decode("ascii") for row in self.values]


def _rounded(layer: int, row: Sequence[float]) -> npt.NDArray[np.float16]:
    given = np.asarray(row)
    if given.ndim != 1 or not given.size or given.dtype.kind not in "fiu":
        raise PolicyError(f"up_scales[{layer}] must be numbers, one per neuron, got {_shortened(row)}")
    with np.errstate(over="ignore"):
        stored = given.astype(_STORED)
    refused = np.flatnonzero(~(np.isfinite(stored) & (stored > 0)))
    if len(refused):
        j = int(refused[0])
        raise PolicyError(
            f"up_scales[{layer}][{j}] must be above 0 in float16, from 6e-8 to 65504, got {float(given[j])!r}"
        )
    return stored


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
