"""Tunes a policy to a wanted saving by decoding, because what is left out shifts what comes after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from skipkernels.calibration.passages import Passage
from skipkernels.calibration.scoring import Comparison, Score, compare, score
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import DensePolicy, Policy

if TYPE_CHECKING:
    from skipkernels.engine import Engine

Kind = Literal["neurons", "similarity", "mixed", "fixed", "random"]
KINDS: tuple[Kind, ...] = ("neurons", "similarity", "mixed", "fixed", "random")
"""What leaves out work: single neurons; blocks by similarity; neurons beside blocks; fixed or random blocks."""
TOLERANCE = 0.01
"""The largest deviation of a measured saving that counts as reached."""
CLOSE = 0.003
"""The deviation at which the search for a threshold stops."""
_MAX_RUNS = 6  # decodes to find one threshold
KL_EXPONENT = 2.5
"""KL grows with this power of the saving: blocks of the demo model 1.8 to 2, neurons of SmolLM2 2.6 to 3."""


@dataclass(frozen=True)
class Trial:
    """A policy beside the dense model on some passages."""

    kind: Kind
    policy: Policy
    comparison: Comparison
    passage_kl: tuple[float, ...]  # mean KL(dense || policy) of each passage over its tokens, warm-up included, nats
    wanted: float

    @property
    def kl(self) -> float:
        """Mean KL(dense || policy) over all decoded tokens, warm-up included, nats."""
        return float(np.mean(self.passage_kl))

    @property
    def missed(self) -> float:
        return abs(self.comparison.skip_ratio - self.wanted)

    @property
    def costs(self) -> npt.NDArray[np.float64]:
        """``passage_kl`` as it would be at the wanted saving, from how KL grows with it."""
        ratio = self.comparison.skip_ratio
        factor = (self.wanted / ratio) ** KL_EXPONENT if ratio else float("inf")
        return np.array(self.passage_kl) * factor

    @property
    def rank(self) -> tuple[bool, float]:
        """Smaller is better: what reaches the saving (half a block may be missing) first, then the least divergence."""
        half_a_block = 0.5 / self.comparison.layers
        return self.missed > max(TOLERANCE, half_a_block) + TOLERANCE, float(self.costs.mean())


class Decoder:
    """Decodes the same passages under one policy after the other, beside the dense model."""

    def __init__(self, engine: Engine, passages: Sequence[Passage], on_step: Callable[[int], None]) -> None:
        """``on_step`` is called with the number of tokens each step decoded."""
        self._engine = engine
        self._passages = passages
        self._on_step = on_step
        self._dense = score(engine, passages, DensePolicy(), keep_log_probs=True, on_step=on_step)

    def share_past_warmup(self, warmup_tokens: int) -> float:
        """Share of the decoded tokens that may leave something out. The first one never does."""
        counts = [passage.decoded_tokens for passage in self._passages]
        return sum(max(0, count - max(1, warmup_tokens)) for count in counts) / sum(counts)

    def try_out(self, kind: Kind, policy: Policy, wanted: float, warmup_tokens: int) -> Trial:
        scores: list[Score] = score(self._engine, self._passages, policy, reference=self._dense, on_step=self._on_step)
        passage_kl = tuple(float(s.kl.mean(dtype=np.float64)) for s in scores if s.kl is not None)
        return Trial(kind, policy, compare(self._dense, scores, warmup_tokens), passage_kl, wanted)

    def tune(
        self, kind: Kind, policy_at: Callable[[float], Policy], wanted: float, warmup_tokens: int, runs: int = _MAX_RUNS
    ) -> Trial:
        """The trial closest to ``wanted``. ``policy_at`` makes a policy for a saving of the tokens past the warm-up,
        from dense activations; what the decode saves more or less corrects the saving asked of it. Where that does not
        converge, it is bisected.

        Raises:
            PolicyError: no policy is possible.
        """
        share = self.share_past_warmup(warmup_tokens)
        goal, low, high = wanted, 0.0, share
        trials: list[Trial] = []
        for _ in range(runs):
            try:
                candidate = policy_at(goal / share)
            except PolicyError:
                if trials:
                    break
                raise
            if any(candidate == trial.policy for trial in trials):
                break  # nothing lies between too low and too high
            trials.append(self.try_out(kind, candidate, wanted, warmup_tokens))
            error = trials[-1].comparison.skip_ratio - wanted
            if abs(error) <= CLOSE:
                break
            low, high = (low, goal) if error > 0 else (goal, high)
            goal = goal - error if low < goal - error < high else (low + high) / 2
        return min(trials, key=lambda trial: trial.missed)
