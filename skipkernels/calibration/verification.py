"""Compares a calibrated policy on held-out text with baselines that do not look at the token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from skipkernels.calibration.passages import Passage
from skipkernels.calibration.scoring import Comparison, Score, compare, score
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, Policy, RandomPolicy, SkipPolicy

if TYPE_CHECKING:
    from skipkernels.engine import Engine

_RESAMPLES = 2000
_SEED = 0
DECODES = 5
"""How often ``verify`` decodes the passages, at most."""


@dataclass(frozen=True)
class Baseline:
    """A policy that does not look at the token, with the same warm-up as the calibrated one."""

    policy: Policy
    comparison: Comparison


@dataclass(frozen=True)
class Margin:
    """How much farther a baseline is from the dense model than the calibrated policy.

    ``kl`` is the baseline's mean KL divergence minus the policy's, over all decoded tokens, nats; ``low`` to ``high``
    is its 95 % interval, a paired bootstrap over the passages (Efron 1979).
    """

    against: Literal["fixed", "random"]
    skip_ratio: float  # of the baseline
    kl: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["beats", "is level with", "loses to"]:
        """The result, from the policy's side."""
        if self.low > 0:
            return "beats"
        return "loses to" if self.high < 0 else "is level with"


@dataclass(frozen=True)
class Verification:
    """What was measured on held-out text."""

    held_out: Comparison
    baselines: tuple[Baseline, ...]
    margins: tuple[Margin, ...]


def verify(
    engine: Engine,
    passages: Sequence[Passage],
    policy: SkipPolicy,
    mean_similarity: Sequence[float],
    on_step: Callable[[int], None],
) -> Verification:
    """Decodes ``passages`` under ``policy`` and under the baselines.

    The fixed baseline skips the layers with the highest ``mean_similarity``. No number of layers skips exactly as much
    as the policy; so the two nearest numbers are decoded, and the policy is compared with a mix of both that skips the
    same number of FFNs.
    """
    dense = score(engine, passages, DensePolicy(), keep_log_probs=True, on_step=on_step)

    def decode(chosen: Policy) -> tuple[list[Score], Comparison]:
        scores = score(engine, passages, chosen, reference=dense, on_step=on_step)
        return scores, compare(dense, scores, policy.warmup_tokens)

    layers = engine.config.num_hidden_layers
    skipping, held_out = decode(policy)
    wanted = held_out.skip_ratio_past_warmup * layers
    best_first = sorted(range(layers), key=lambda layer: -mean_similarity[layer])
    fewer, more = (
        FixedPolicy(tuple(best_first[:count]), policy.warmup_tokens) for count in (int(wanted), int(wanted) + 1)
    )
    dense_layers = 1 if wanted <= layers - 2 else 0  # at each end
    random = RandomPolicy(wanted / layers, _SEED, dense_layers, dense_layers, policy.warmup_tokens)
    decoded = [(chosen, *decode(chosen)) for chosen in (fewer, more, random)]

    share = wanted - int(wanted)  # of the tokens that the larger set decodes
    (_, fewer_scores, fewer_result), (_, more_scores, more_result), (_, random_scores, random_result) = decoded
    mixed = (1 - share) * _kl(fewer_scores) + share * _kl(more_scores)
    mixed_ratio = (1 - share) * fewer_result.skip_ratio + share * more_result.skip_ratio
    return Verification(
        held_out,
        tuple(Baseline(chosen, comparison) for chosen, _, comparison in decoded),
        (
            _margin("fixed", mixed_ratio, mixed - _kl(skipping)),
            _margin("random", random_result.skip_ratio, _kl(random_scores) - _kl(skipping)),
        ),
    )


def _kl(scores: Sequence[Score]) -> npt.NDArray[np.float64]:
    """Mean of each passage, warm-up included."""
    return np.array([score.kl.mean(dtype=np.float64) for score in scores if score.kl is not None])


def _margin(against: Literal["fixed", "random"], skip_ratio: float, differences: npt.NDArray[np.float64]) -> Margin:
    """``differences`` are those of the passages, all of one length."""
    count = len(differences)
    drawn = np.random.default_rng(_SEED).integers(0, count, (_RESAMPLES, count))
    low, high = np.percentile(differences[drawn].mean(axis=1), (2.5, 97.5))
    return Margin(against, skip_ratio, float(differences.mean()), float(low), float(high))
