"""The policies that a calibration may choose from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import BatchRule, SkipPolicy

_GRID = 24
_SPANS = 12


@dataclass(frozen=True)
class SearchSpace:
    """The skip policies of a model of ``layers``. A parameter that is given (not None) is not searched for."""

    layers: int
    spans: tuple[int | None, ...] | None = None
    first_dense_layers: int | None = None
    last_dense_layers: int | None = None
    warmup_tokens: int = 1  # the same as none: the first generated token always runs every FFN
    batch_rule: BatchRule = "per_row"

    def __post_init__(self) -> None:
        if self.spans is not None and not self.spans:
            raise PolicyError("spans is empty: name at least one span to try, or leave it out")

    @property
    def widest(self) -> SkipPolicy:
        """The policy that may skip most: the fewest dense layers and warm-up tokens that this space allows."""
        return SkipPolicy(
            first_dense_layers=self.first_dense_layers or 0,
            last_dense_layers=self.last_dense_layers or 0,
            warmup_tokens=self.warmup_tokens,
            batch_rule=self.batch_rule,
        )

    @property
    def tried_spans(self) -> tuple[int | None, ...]:
        """The given spans; else None and at most 12 others, from one layer to half of all layers."""
        if self.spans is not None:
            return self.spans
        half = max(1, self.layers // 2)
        return (None, *map(int, np.unique(np.linspace(1, half, min(half, _SPANS)).round())))

    def windows(self) -> list[tuple[int, int]]:
        """Pairs (first_dense_layers, last_dense_layers) that leave a layer to skip: layer ``first_dense_layers`` is
        tested, those after it may be skipped. All pairs up to 24 layers, a grid of them in deeper models."""
        step = -(-self.layers // _GRID)
        starts = range(0, self.layers - 1, step) if self.first_dense_layers is None else [self.first_dense_layers]
        ends = range(0, self.layers - 1, step) if self.last_dense_layers is None else [self.last_dense_layers]
        return [(start, end) for start in starts for end in ends if start + end <= self.layers - 2]

    def candidates(self) -> Iterator[SkipPolicy]:
        """Every span in every window, with the default threshold. Where spans are not given, those as long as the
        window are left out, because they equal None."""
        for span in self.tried_spans:
            for start, end in self.windows():
                policy = replace(self.widest, span=span, first_dense_layers=start, last_dense_layers=end)
                if self.spans is not None or span is None or span < self._gated(policy):
                    yield policy

    @property
    def reachable_ratio(self) -> float:
        """The highest skip ratio of a token after the warm-up."""
        return max(replace(self.widest, span=span).reachable_ratio(self.layers) for span in self.tried_spans)

    @property
    def label(self) -> str:
        widest = self.widest
        return f"first_dense_layers={widest.first_dense_layers}, last_dense_layers={widest.last_dense_layers}"

    def _gated(self, policy: SkipPolicy) -> int:
        """Layers that ``policy`` may skip."""
        return self.layers - policy.first_dense_layers - policy.last_dense_layers - 1
