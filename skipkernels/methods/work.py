"""Work: what decoding executed and skipped, in units that apply to every method."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import ModelWeights

UnreadMap = npt.NDArray[np.float32] | npt.NDArray[np.bool_]
"""[tokens, layers], the share of the FFN's or layer's bytes that was not read; True: all."""


@dataclass(frozen=True)
class Work:
    """Counts over generated tokens; the counts of several generations add up.

    Layer bytes are those of the layers' matrices. Embeddings, norms and lm_head are not counted, because they are the
    same for every method, except that early exit also reads lm_head for every layer it tests.
    """

    tokens: int = 0
    ffns: int = 0
    ffns_skipped: float = 0.0  # parts of FFNs count as such
    layer_bytes: float = 0
    layer_bytes_skipped: float = 0.0

    @classmethod
    def of_ffns(cls, weights: ModelWeights, unread: UnreadMap) -> Work:
        """The work of a method that leaves out FFNs or neurons only."""
        return cls._of(weights, unread, weights.ffn_nbytes())

    @classmethod
    def of_layers(cls, config: ModelConfig, weights: ModelWeights, unread: UnreadMap, *, fills_cache: bool) -> Work:
        """The work of a method that skips whole layers; ``fills_cache``: it still reads their k_proj and v_proj."""
        qkv = sum(layer.qkv_proj.nbytes for layer in weights.layers) / len(weights.layers)
        kv_bytes = qkv * 2 * config.num_key_value_heads * config.head_dim / config.qkv_size
        return cls._of(weights, unread, weights.layer_nbytes() - kv_bytes * fills_cache)

    @classmethod
    def _of(cls, weights: ModelWeights, unread: UnreadMap, bytes_each: float) -> Work:
        count = float(unread.sum(dtype=np.float64))
        return cls(
            tokens=len(unread),
            ffns=unread.size,
            ffns_skipped=count,
            layer_bytes=unread.size * weights.layer_nbytes(),
            layer_bytes_skipped=count * bytes_each,
        )

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(Work)))

    @property
    def ffn_skip_ratio(self) -> float:
        """Share of the FFN bytes not read, over layers x tokens; a layer that is skipped reads none of its FFN."""
        return self.ffns_skipped / self.ffns if self.ffns else 0.0

    @property
    def layer_bytes_saved(self) -> float:
        """Share of the layers' weight bytes that were not read."""
        return self.layer_bytes_skipped / self.layer_bytes if self.layer_bytes else 0.0
