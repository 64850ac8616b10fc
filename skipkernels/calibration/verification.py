"""The best policy of each kind on held-out text, and by how much one is closer to the dense model than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from skipkernels.calibration.tuning import Decoder, Kind, Trial

Verdict = Literal["beats", "is level with", "loses to", "cannot be told from"]
FEWEST_PASSAGES = 4
"""An interval over fewer says nothing: that over a single passage has no width."""
_RESAMPLES = 2000
_SEED = 0


@dataclass(frozen=True)
class Margin:
    """How much farther another kind is from the dense model than the chosen policy.

    ``kl`` is its mean KL divergence minus the policy's at the wanted saving, over all decoded tokens, nats; ``low`` to
    ``high`` is its 95 % interval, a paired bootstrap over the passages (Efron 1979).
    """

    against: Kind
    skip_ratio: float  # of the other
    kl: float
    low: float
    high: float
    passages: int
    tokens: int  # decoded, in all passages

    @property
    def verdict(self) -> Verdict:
        """The result, from the policy's side."""
        if self.passages < FEWEST_PASSAGES:
            return "cannot be told from"
        if self.low > 0:
            return "beats"
        return "loses to" if self.high < 0 else "is level with"


def verify(decoder: Decoder, trials: Sequence[Trial], warmup_tokens: int) -> list[Trial]:
    """The policies of ``trials`` on the decoder's passages, the best first."""
    verified = [decoder.try_out(trial.kind, trial.policy, trial.wanted, warmup_tokens) for trial in trials]
    return sorted(verified, key=lambda trial: trial.rank)


def margin(best: Trial, other: Trial) -> Margin:
    differences = other.costs - best.costs
    count = len(differences)
    drawn = np.random.default_rng(_SEED).integers(0, count, (_RESAMPLES, count))
    low, high = np.percentile(differences[drawn].mean(axis=1), (2.5, 97.5))
    mean, tokens = float(differences.mean()), other.comparison.tokens
    return Margin(other.kind, other.comparison.skip_ratio, mean, float(low), float(high), count, tokens)
