"""Simulates the skip rule on recorded similarities, as if skipping an FFN did not change later layers.

Hundreds of policies per second, to find the few that are worth decoding with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from skipkernels.skipping.policy import SkipPolicy

Similarities = npt.NDArray[np.float32]
"""[positions, layers]: cosine of the residual stream before and after each FFN of the dense model."""

_BISECTIONS = 24
_LOG_FACTOR = 9.0  # bound on the logarithm of the factor by which a threshold's distance from 1 is scaled
_SLACK = 0.01  # of a ratio: policies that miss it by less are kept


def simulate(similarities: Similarities, policy: SkipPolicy) -> npt.NDArray[np.bool_]:
    """The FFNs that ``policy`` skips, [positions, layers]; every position counts as after the warm-up."""
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


def tuned(similarities: Similarities, policy: SkipPolicy, ratio: float) -> SkipPolicy:
    """``policy`` with the threshold at which it skips ``ratio`` of the FFNs, or slightly less.

    If ``policy`` cannot skip that much, the threshold lets every test pass. Per-layer thresholds are moved together:
    the distance of each from 1 is multiplied by the same factor.
    """
    if policy.layer_thresholds is None:
        policy = replace(policy, threshold=0.99)
    fewer, more = -_LOG_FACTOR, _LOG_FACTOR
    if simulate(similarities, _scaled(policy, more)).mean() <= ratio:
        return _scaled(policy, more)
    for _ in range(_BISECTIONS):
        middle = (fewer + more) / 2
        if simulate(similarities, _scaled(policy, middle)).mean() > ratio:
            more = middle
        else:
            fewer = middle
    return _scaled(policy, fewer)


def _scaled(policy: SkipPolicy, log_factor: float) -> SkipPolicy:
    """The distance of each threshold from 1 times e to ``log_factor``."""

    def scaled(threshold: float) -> float:
        return round(max(-1.0, 1.0 - (1.0 - threshold) * math.exp(log_factor)), 7)

    if policy.layer_thresholds is None:
        return replace(policy, threshold=scaled(policy.threshold))
    return replace(policy, layer_thresholds=tuple(scaled(threshold) for threshold in policy.layer_thresholds))


def rank(
    similarities: Similarities, block_kl: npt.NDArray[np.float32], policies: Iterable[SkipPolicy], ratio: float
) -> list[SkipPolicy]:
    """The policies that can skip about ``ratio``, each tuned to it, the smallest simulated cost first.

    A skipped FFN costs what ``block_kl`` [positions, layers] says that it costs alone. Where a policy misses the ratio,
    its cost is scaled with the square of the ratio. Of policies that skip the same FFNs, one is kept.
    """
    costs: dict[bytes, tuple[float, SkipPolicy]] = {}
    for policy in policies:
        if policy.reachable_ratio(similarities.shape[1]) < ratio - _SLACK:
            continue
        candidate = tuned(similarities, policy, ratio)
        skipped = simulate(similarities, candidate)
        if not skipped.any():
            continue
        cost = float((block_kl * skipped).sum(axis=1).mean())
        costs[np.packbits(skipped).tobytes()] = (cost * float(ratio / skipped.mean()) ** 2, candidate)
    return [policy for _, policy in sorted(costs.values(), key=lambda entry: entry[0])]
