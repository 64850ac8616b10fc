"""Tunes a policy to a wanted skip ratio by decoding, because skipping shifts later similarities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from skipkernels.calibration.passages import Passage
from skipkernels.calibration.scoring import Comparison, Score, compare, score
from skipkernels.calibration.simulation import Similarities, tuned
from skipkernels.skipping.policy import DensePolicy, SkipPolicy

if TYPE_CHECKING:
    from skipkernels.engine import Engine

RATIO_TOLERANCE = 0.01
"""The largest deviation of a measured skip ratio that counts as reached."""
CLOSE = 0.003
"""The deviation at which the search for a threshold stops."""
_MAX_RUNS = 8  # decodes to find one threshold
_KL_EXPONENT = (
    2  # KL grows with this power of the skip ratio; measured on the demo model, ratios 0.23 to 0.27: 1.8 to 2
)


@dataclass(frozen=True)
class Trial:
    """A policy at the threshold that brought it closest to the wanted ratio, beside the dense model."""

    policy: SkipPolicy
    comparison: Comparison
    kl: float  # mean KL(dense || policy) over all decoded tokens, warm-up included, nats
    wanted_ratio: float
    bias: float  # measured less simulated skip ratio

    @property
    def missed(self) -> float:
        return abs(self.comparison.skip_ratio - self.wanted_ratio)

    @property
    def cost(self) -> float:
        """``kl`` extrapolated to the wanted ratio, assuming that it grows with the square of the ratio."""
        ratio = self.comparison.skip_ratio
        return self.kl * (self.wanted_ratio / ratio) ** _KL_EXPONENT if ratio else float("inf")

    @property
    def rank(self) -> tuple[float, float]:
        """Smaller is better: the wanted ratio first, then the least divergence from the dense model."""
        return max(0.0, self.missed - RATIO_TOLERANCE), self.cost


class Tuner:
    """Decodes the same passages under one policy after the other, beside the dense model."""

    def __init__(
        self,
        engine: Engine,
        passages: Sequence[Passage],
        similarities: Similarities,
        wanted_ratio: float,
        on_step: Callable[[int], None],
        dense: Sequence[Score] | None = None,
    ) -> None:
        """``similarities`` are the dense model's at the decoded positions of these passages, or of more text;
        ``on_step`` is called with the number of tokens each step decoded; ``dense`` is computed if not given."""
        self.similarities = similarities
        self.wanted_ratio = wanted_ratio
        self._engine = engine
        self._passages = passages
        self._on_step = on_step
        self._dense = dense or score(engine, passages, DensePolicy(), keep_log_probs=True, on_step=on_step)

    @property
    def tokens(self) -> int:
        """Tokens decoded under each policy."""
        return sum(passage.decoded_tokens for passage in self._passages)

    def on_part(self, passages: int) -> Tuner:
        """A tuner on about so many of the passages, evenly spread."""
        step = max(1, len(self._passages) // passages)
        return Tuner(
            self._engine,
            self._passages[::step],
            self.similarities,
            self.wanted_ratio,
            self._on_step,
            self._dense[::step],
        )

    def share_past_warmup(self, policy: SkipPolicy) -> float:
        """Share of the decoded tokens that may skip. The first one never does."""
        warmup = max(1, policy.warmup_tokens)
        return sum(max(0, passage.decoded_tokens - warmup) for passage in self._passages) / self.tokens

    def tune(self, policy: SkipPolicy, bias: float = 0.0, *, close: float = CLOSE, runs: int = _MAX_RUNS) -> Trial:
        """Moves the threshold of ``policy`` until it skips the wanted ratio within ``close``.

        The simulation gives the threshold to try; the difference between decoded and simulated ratio, initially
        ``bias``, corrects the goal of the next simulation. Where that does not converge, goals are bisected.
        """
        share = self.share_past_warmup(policy)
        goal, low, high = self.wanted_ratio - bias, 0.0, 1.0
        trials: list[Trial] = []
        for _ in range(runs):
            candidate = tuned(self.similarities, policy, goal / share)
            if any(candidate == trial.policy for trial in trials):
                break  # no threshold lies between too low and too high
            trials.append(self._try(candidate, goal))
            error = trials[-1].comparison.skip_ratio - self.wanted_ratio
            if abs(error) <= close:
                break
            low, high = (low, goal) if error > 0 else (goal, high)
            goal = goal - error if low < goal - error < high else (low + high) / 2
        return min(trials, key=lambda trial: trial.missed)

    def _try(self, policy: SkipPolicy, goal: float) -> Trial:
        skipping = score(self._engine, self._passages, policy, reference=self._dense, on_step=self._on_step)
        comparison = compare(self._dense, skipping, policy.warmup_tokens)
        kl = np.concatenate([passage.kl for passage in skipping if passage.kl is not None])
        return Trial(policy, comparison, float(kl.mean()), self.wanted_ratio, comparison.skip_ratio - goal)
