"""Calibration: finds the skip policy closest to the dense model at a wanted skip ratio.

1. The dense model reads the calibration text; the similarity of every layer is recorded at every position.
2. ``policy_search`` looks for threshold, span, dense layers and warm-up, first in a simulation on those similarities,
   then by teacher-forced decoding of one half of the text.
3. ``verification`` measures the best policy on the other half, beside a fixed and a random choice of FFNs.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipkernels import __version__
from skipkernels.calibration.passages import cut_passages
from skipkernels.calibration.policy_search import search
from skipkernels.calibration.scoring import Comparison, dense_similarities
from skipkernels.calibration.search_space import SearchSpace
from skipkernels.calibration.simulation import Similarities
from skipkernels.calibration.tuning import RATIO_TOLERANCE, Trial, Tuner
from skipkernels.calibration.verification import DECODES, Baseline, Margin, verify
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import BatchRule, SkipPolicy
from skipkernels.skipping.policy_file import save_policy
from skipkernels.support.progress import Meter, Progress

if TYPE_CHECKING:
    from skipkernels.engine import Engine


@dataclass(frozen=True)
class SimilarityCurve:
    """Cosine of the residual stream before and after each layer's FFN, dense, over the calibration positions."""

    mean: tuple[float, ...]
    p10: tuple[float, ...]
    p90: tuple[float, ...]

    @classmethod
    def of(cls, similarities: Similarities) -> SimilarityCurve:
        rows = (similarities.mean(axis=0), *np.quantile(similarities, (0.1, 0.9), axis=0))
        return cls(*(tuple(round(float(value), 6) for value in row) for row in rows))


@dataclass(frozen=True)
class Calibration:
    """The policy that was found, and its measurements."""

    policy: SkipPolicy
    wanted_ratio: float
    held_out: Comparison
    baselines: tuple[Baseline, ...]  # on the held-out text, too
    margins: tuple[Margin, ...]
    trials: tuple[Trial, ...]  # on the search half of the text, the best first
    curve: SimilarityCurve
    prompt_tokens: int
    new_tokens: int
    fingerprint: str
    dtype: str

    @property
    def reached(self) -> bool:
        """Whether the search reached the wanted ratio. It may not if the similarities are so close together that a
        threshold lets all of them pass or none."""
        return self.trials[0].missed <= RATIO_TOLERANCE

    def measured(self) -> dict[str, Any]:
        """The measurements that the policy file keeps: plain JSON."""
        return {
            "wanted_ratio": self.wanted_ratio,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "held_out": asdict(self.held_out),
            "baselines": [{"policy": b.policy.to_dict(), "held_out": asdict(b.comparison)} for b in self.baselines],
            "margins": [{**asdict(margin), "verdict": margin.verdict} for margin in self.margins],
            "search": asdict(self.trials[0].comparison),
            "similarity": asdict(self.curve),
            "dtype": self.dtype,
            "date": date.today().isoformat(),
            "versions": {
                "skipkernels": __version__,
                "python": platform.python_version(),
                "torch": version("torch"),
                "transformers": version("transformers"),
            },
        }

    def save(self, path: str | Path) -> None:
        """Writes a policy file."""
        save_policy(path, self.policy, fingerprint=self.fingerprint, measured=self.measured())


def calibrate(
    engine: Engine,
    texts: Sequence[str | Sequence[int]],
    wanted_ratio: float,
    *,
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    passages: int = 32,
    spans: Sequence[int | None] | None = None,
    first_dense_layers: int | None = None,
    last_dense_layers: int | None = None,
    warmup_tokens: int | None = None,
    batch_rule: BatchRule = "per_row",
    per_layer: bool = False,
    progress: Progress = lambda stage, share: None,
) -> Calibration:
    """Finds the policy that skips ``wanted_ratio`` of all FFN executions with the least change to the output.

    The change is the mean KL divergence from the dense model over all decoded tokens, warm-up included. The same
    arguments give the same policy.

    Args:
        engine: decodes in batches; a larger ``max_batch_size``, up to half of ``passages``, is faster.
        texts: text or token ids, in any number of pieces. The search uses the first half of each, the second half is
            held out.
        wanted_ratio: skipped FFNs over layers x generated tokens, warm-up and dense layers included, in (0, 1).
        prompt_tokens: tokens of each passage that are prefilled.
        new_tokens: tokens of each passage that are decoded. The ratio holds for generations of this length: shorter
            ones skip less, because the warm-up takes a larger share of them.
        passages: how many passages to cut from the texts, at most.
        spans: candidates for ``SkipPolicy.span``; None: found.
        first_dense_layers, last_dense_layers, warmup_tokens: as in ``SkipPolicy``; None: found.
        batch_rule: as in ``SkipPolicy``.
        per_layer: find ``SkipPolicy.layer_thresholds``, which takes up to twice as long.
        progress: see ``Progress``.

    Raises:
        RequestError: there is not enough text.
        PolicyError: the ratio cannot be reached; the message says what can.
    """
    layers = engine.config.num_hidden_layers
    allowed = None if spans is None else tuple(spans)
    space = SearchSpace(layers, allowed, first_dense_layers, last_dense_layers, warmup_tokens, batch_rule)
    _check_ratio(wanted_ratio, space, new_tokens)
    search_part, held_out_part = cut_passages(engine, texts, passages, prompt_tokens, new_tokens)

    meter = Meter(progress)
    meter.stage("reading the text", 0.03, len(search_part))
    observed = []
    for passage_similarities in dense_similarities(engine, search_part):
        observed.append(passage_similarities)
        meter.count(1)
    similarities = np.concatenate(observed)
    curve = SimilarityCurve.of(similarities)

    meter.stage("decoding with every FFN", 0.05, len(search_part) * new_tokens)
    tuner = Tuner(engine, search_part, similarities, wanted_ratio, meter.count)
    trials = search(tuner, space, per_layer, meter, until=0.95)
    best = trials[0].policy

    meter.stage("verifying on held-out text", 1.0, DECODES * len(held_out_part) * new_tokens)
    verified = verify(engine, held_out_part, best, curve.mean, meter.count)
    return Calibration(
        policy=best,
        wanted_ratio=wanted_ratio,
        held_out=verified.held_out,
        baselines=verified.baselines,
        margins=verified.margins,
        trials=tuple(trials),
        curve=curve,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        fingerprint=engine.fingerprint,
        dtype=engine.dtype,
    )


def _check_ratio(wanted: float, space: SearchSpace, new_tokens: int) -> None:
    """Raises PolicyError unless some policy can skip ``wanted`` of all FFNs."""
    if not 0.0 < wanted < 1.0:
        raise PolicyError(f"the wanted skip ratio must lie in (0, 1), got {wanted}")
    widest, layers = space.widest, space.layers
    past_warmup = max(0.0, 1 - max(1, widest.warmup_tokens) / new_tokens)
    reachable = past_warmup * max(replace(widest, span=span).reachable_ratio(layers) for span in space.tried_spans)
    if wanted > reachable:
        raise PolicyError(
            f"a skip ratio of {wanted} cannot be reached: with first_dense_layers={widest.first_dense_layers}, "
            f"last_dense_layers={widest.last_dense_layers} and {widest.warmup_tokens} warm-up tokens, "
            f"{new_tokens} generated tokens of {layers} layers skip at most {reachable:.3f}"
        )
