"""The policies that a calibration may choose from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import BatchRule, SkipPolicy

WARMUPS = (1, 4, 8, 16, 25)
"""Warm-ups to try where none is given. 1 is the same as none: the first generated token always runs every FFN."""
_GRID = 24
_SPANS = 12


@dataclass(frozen=True)
class SearchSpace:
    """The skip policies of a model of ``layers``. A parameter that is given (not None) is not searched for."""

    layers: int
    spans: tuple[int | None, ...] | None = None
    first_dense_layers: int | None = None
    last_dense_layers: int | None = None
    warmup_tokens: int | None = None
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
            warmup_tokens=WARMUPS[0] if self.warmup_tokens is None else self.warmup_tokens,
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

    def neighbours(self, policy: SkipPolicy) -> Iterator[SkipPolicy]:
        """``policy`` with one bound or its span moved by a layer, unless that is given or impossible."""
        moves: list[SkipPolicy] = []
        for step in (-1, 1):
            if self.first_dense_layers is None and policy.first_dense_layers + step >= 0:
                moves.append(replace(policy, first_dense_layers=policy.first_dense_layers + step))
            if self.last_dense_layers is None and policy.last_dense_layers + step >= 0:
                moves.append(replace(policy, last_dense_layers=policy.last_dense_layers + step))
            span = step + (self._gated(policy) if policy.span is None else policy.span)
            if self.spans is None and span >= 1:
                moves.append(replace(policy, span=span))
        for moved in moves:
            if (gated := self._gated(moved)) > 0:
                yield replace(moved, span=None) if self.spans is None and (moved.span or 0) >= gated else moved

    def _gated(self, policy: SkipPolicy) -> int:
        """Layers that ``policy`` may skip."""
        return self.layers - policy.first_dense_layers - policy.last_dense_layers - 1
