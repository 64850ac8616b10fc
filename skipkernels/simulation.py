"""The skip rule on recorded similarities: what a policy would skip if skipping changed nothing after it.

Thousands of policies a second, to find the few that are worth decoding with.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from skipkernels.policy import SkipPolicy

Similarities = npt.NDArray[np.float32]
"""[positions, layers]: cosine of the residual stream before and after each FFN of the dense model."""

_BISECTIONS = 24
_GRID = 12


def simulate(similarities: Similarities, policy: SkipPolicy) -> npt.NDArray[np.bool_]:
    """The FFNs that ``policy`` skips, [positions, layers], every position taken as past its warm-up."""
    positions, layers = similarities.shape
    plan = policy.plan(layers)
    skipped = np.zeros((positions, layers), dtype=bool)
    remaining = np.zeros(positions, dtype=np.int64)
    for layer in plan.gated_layers:
        triggered = ~skipped[:, layer - 1] & (similarities[:, layer - 1] >= plan.thresholds[layer - 1])
        remaining[triggered] = plan.span
        skipped[:, layer] = remaining > 0
        remaining -= skipped[:, layer]
    return skipped


def reachable_ratio(policy: SkipPolicy, layers: int) -> float:
    """Share of the FFNs of a token past its warm-up that ``policy`` skips at most: when every test passes."""
    return float(simulate(np.ones((1, layers), dtype=np.float32), policy).mean())


def threshold_for(similarities: Similarities, policy: SkipPolicy, ratio: float) -> float:
    """The threshold at which ``policy`` skips ``ratio`` of the FFNs, or as near as the similarities allow."""
    lower, upper = -1.0, 1.0  # skips too much, too little
    for _ in range(_BISECTIONS):
        middle = between(lower, upper)
        if simulate(similarities, replace(policy, threshold=middle)).mean() > ratio:
            lower = middle
        else:
            upper = middle
    return upper


def between(lower: float, upper: float) -> float:
    """Halfway between two similarities, on the logarithmic scale of their distance from 1."""
    return 1.0 - float(np.sqrt((1.0 - lower) * max(1.0 - upper, 1e-7)))


def windows(layers: int, cold_start: int | None = None, cold_end: int | None = None) -> list[tuple[int, int]]:
    """Cold bounds worth trying in a model of ``layers``, as (cold_start, cold_end), where they are not given.

    A grid, coarser for deeper models, of all that leave a layer to skip: layer ``cold_start`` is tested, those after
    it may be skipped.
    """
    step = -(-layers // _GRID)
    starts = range(0, layers - 1, step) if cold_start is None else [cold_start]
    ends = range(0, layers - 1, step) if cold_end is None else [cold_end]
    return [(start, end) for start in starts for end in ends if start + end <= layers - 2]


def rank(similarities: Similarities, policies: Iterable[SkipPolicy], ratio: float) -> list[SkipPolicy]:
    """The policies that can skip ``ratio``, each with its threshold for it, the least change left out first.

    The change of a skipped FFN is taken as 1 - similarity. Of policies that skip the same FFNs one is kept.
    """
    costs: dict[bytes, tuple[float, SkipPolicy]] = {}
    for policy in policies:
        if reachable_ratio(policy, similarities.shape[1]) < ratio:
            continue
        tuned = replace(policy, threshold=threshold_for(similarities, policy, ratio))
        skipped = simulate(similarities, tuned)
        left_out = float(((1.0 - similarities) * skipped).sum(axis=1).mean())
        costs[np.packbits(skipped).tobytes()] = (left_out, tuned)
    return [policy for _, policy in sorted(costs.values(), key=lambda entry: entry[0])]
