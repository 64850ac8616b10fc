"""What binds a policy file to a model: a hash over its architecture and over samples of all its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SAMPLES = 1 << 14
"""Elements of a tensor that are hashed: all of a small one, evenly spread ones of a larger."""
_FP16_SUBNORMAL = 2.0**-13
"""Below it fp16 holds fewer bits than bf16: such values count as zero."""
_SEPARATOR = "."


class WeightsHash:
    """Takes tensors in any order, in the dtype they are stored in, and says what they hold.

    Values are compared as bf16, so that one checkpoint has one hash in every dtype that holds its values.
    """

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        step += 1 - step % 2  # odd, so that not the same few columns of every row are taken
        values = flat[::step].to(torch.bfloat16)
        values = torch.where(values.abs() < _FP16_SUBNORMAL, torch.zeros_like(values), values)
        self._digests[name] = hashlib.sha256(values.cpu().view(torch.int16).numpy().tobytes()).digest()

    def hexdigest(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._digests):
            digest.update(name.encode() + self._digests[name])
        return digest.hexdigest()[:16]


def fingerprint(architecture_hash: str, norms: Iterable[torch.Tensor], weights_hash: str) -> str:
    """Files of the first releases hold the part before the separator, which knows two norms only."""
    import torch

    digest = hashlib.sha256(architecture_hash.encode())
    for norm in norms:
        digest.update(norm.bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return f"{digest.hexdigest()[:16]}{_SEPARATOR}{weights_hash}"


def belongs_to(made_for: object, model: str) -> bool:
    """Whether a policy file that was ``made_for`` a model may be used with the one of fingerprint ``model``."""
    return made_for in (model, model.partition(_SEPARATOR)[0])
