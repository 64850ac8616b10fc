"""Calibration: the similarity threshold, span and cold layers that skip a wanted share of the FFNs at the least cost.

1. The dense model reads the calibration text; the similarity of every layer is recorded at every position.
2. The rule is simulated on those similarities. That is cheap, so it ranks many windows of layers and spans by the
   change to the residual stream that they leave out.
3. The best of them decode the text by force (``scoring``), because skipping shifts the similarities that follow. The
   threshold of each is moved until the measured ratio is the wanted one.
4. Of those at the wanted ratio the one closest to the dense model (mean KL divergence) is taken, and measured once
   more on text that the search has not seen.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipkernels import __version__
from skipkernels.errors import PolicyError
from skipkernels.passages import Passage, cut_passages
from skipkernels.policy import BatchRule, DensePolicy, SkipPolicy
from skipkernels.policy_file import save_policy
from skipkernels.scoring import Comparison, compare, dense_similarities, score
from skipkernels.simulation import Similarities, between, rank, reachable_ratio, threshold_for, windows

if TYPE_CHECKING:
    from skipkernels.engine import Engine

Progress = Callable[[str, float], None]
"""Called as (what is being done, share of the whole calibration that is done)."""

SPANS = (None, 1, 2, 3, 4)
_FINALISTS_PER_SPAN = 3
RATIO_TOLERANCE = 0.01
"""How far a measured skip ratio may be from the wanted one and still count as reached."""
_CLOSE_ENOUGH = 0.003  # where the search for a threshold stops
_RANKED_POSITIONS = 512  # enough to rank candidates by
_MAX_RUNS = 8  # decodes to find one threshold


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
class Trial:
    """A candidate at the threshold that brought it closest to the wanted ratio, measured on the search part."""

    policy: SkipPolicy
    comparison: Comparison


@dataclass(frozen=True)
class Calibration:
    """The policy that was found, and what was measured on the way."""

    policy: SkipPolicy
    wanted_ratio: float
    held_out: Comparison
    trials: tuple[Trial, ...]  # best first
    curve: SimilarityCurve
    prompt_tokens: int
    new_tokens: int
    fingerprint: str
    dtype: str

    @property
    def reached(self) -> bool:
        """Whether the search came to the wanted ratio. It may not where similarities lie so close together that a
        threshold lets all of them pass or none."""
        return abs(self.trials[0].comparison.skip_ratio - self.wanted_ratio) <= RATIO_TOLERANCE

    def measured(self) -> dict[str, Any]:
        """What the policy file says of its policy: plain JSON."""
        return {
            "wanted_ratio": self.wanted_ratio,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "held_out": asdict(self.held_out),
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
    spans: Sequence[int | None] = SPANS,
    cold_start: int | None = None,
    cold_end: int | None = None,
    warmup_tokens: int = 25,
    batch_rule: BatchRule = "per_row",
    progress: Progress = lambda stage, share: None,
) -> Calibration:
    """Finds the policy that skips ``wanted_ratio`` of all FFN executions with the least change to the output.

    Args:
        engine: its rows are used; more of them (``max_batch_size``, up to half of ``passages``) are faster.
        texts: text or token ids, in any number of pieces. The first half of each is searched on, the second half is
            held out.
        wanted_ratio: skipped FFNs over layers x generated tokens, warm-up and cold layers included, in (0, 1).
        prompt_tokens: tokens of each passage that are prefilled.
        new_tokens: tokens of each passage that are decoded. The ratio holds for generations of this length: in
            shorter ones the warm-up weighs more.
        passages: how many passages to cut from the texts, at most.
        spans: candidates for ``SkipPolicy.span``.
        cold_start, cold_end: as in ``SkipPolicy``; None: found.
        warmup_tokens, batch_rule: as in ``SkipPolicy``.
        progress: see ``Progress``.

    Raises:
        RequestError: there is not enough text.
        PolicyError: the ratio cannot be reached; the message says what can.
    """
    base = SkipPolicy(warmup_tokens=warmup_tokens, batch_rule=batch_rule)
    # a token past the warm-up has to skip more, because those in it skip nothing
    past_warmup = max(0.0, 1 - max(1, warmup_tokens) / new_tokens)
    widest = replace(base, cold_start=cold_start or 0, cold_end=cold_end or 0)
    _check_ratio(wanted_ratio, past_warmup, widest, engine.config.num_hidden_layers, spans, new_tokens)
    search_part, held_out_part = cut_passages(engine, texts, passages, prompt_tokens, new_tokens)

    read = _counted(progress, "reading the text", 0.0, 0.05, len(search_part))
    observed = []
    for passage_similarities in dense_similarities(engine, search_part):
        observed.append(passage_similarities)
        read(1)
    similarities = np.concatenate(observed)
    bounds = windows(engine.config.num_hidden_layers, cold_start, cold_end)
    sample = similarities[:: max(1, len(similarities) // _RANKED_POSITIONS)]
    ranked = [
        rank(
            sample,
            [replace(base, span=span, cold_start=start, cold_end=end) for start, end in bounds],
            wanted_ratio / past_warmup,
        )
        for span in spans
    ]
    finalists = [policy for of_span in ranked for policy in of_span[:_FINALISTS_PER_SPAN]]

    search = _Search(engine, search_part, similarities, wanted_ratio, past_warmup, progress)
    trials = [
        search.match_ratio(policy, 0.1 + 0.8 * number / len(finalists), 0.8 / len(finalists))
        for number, policy in enumerate(finalists)
    ]
    trials.sort(key=lambda trial: _rank_of(trial, wanted_ratio))
    best = trials[0].policy

    on_step = _counted(progress, "verifying on held-out text", 0.9, 1.0, 2 * len(held_out_part) * new_tokens)
    dense = score(engine, held_out_part, DensePolicy(), keep_log_probs=True, on_step=on_step)
    skipping = score(engine, held_out_part, best, reference=dense, on_step=on_step)
    return Calibration(
        policy=best,
        wanted_ratio=wanted_ratio,
        held_out=compare(dense, skipping, warmup_tokens),
        trials=tuple(trials),
        curve=SimilarityCurve.of(similarities),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        fingerprint=engine.fingerprint,
        dtype=engine.dtype,
    )


class _Search:
    """Decodes the search part under one policy after the other, beside the dense model."""

    def __init__(
        self,
        engine: Engine,
        passages: Sequence[Passage],
        similarities: Similarities,
        wanted_ratio: float,
        past_warmup: float,
        progress: Progress,
    ) -> None:
        self._engine = engine
        self._passages = passages
        self._similarities = similarities
        self._wanted = wanted_ratio
        self._past_warmup = past_warmup
        self._progress = progress
        self._tokens = sum(passage.decoded_tokens for passage in passages)
        on_step = _counted(progress, "decoding with every FFN", 0.05, 0.1, self._tokens)
        self._dense = score(engine, passages, DensePolicy(), keep_log_probs=True, on_step=on_step)

    def match_ratio(self, candidate: SkipPolicy, begin: float, width: float) -> Trial:
        """Moves the candidate's threshold until it skips the wanted ratio.

        The simulation says which threshold to try; what the decode gets wrong of it is added to the next goal. Where
        that leads nowhere, the thresholds known to skip too much and too little are bisected.
        """
        lower, upper = -1.0, 1.0  # skips too much, too little
        goal = self._wanted
        trials: list[Trial] = []
        for run in range(_MAX_RUNS):
            threshold = threshold_for(self._similarities, candidate, goal / self._past_warmup)
            if not lower < threshold < upper:
                threshold = between(lower, upper)
            policy = replace(candidate, threshold=round(threshold, 7))
            trial = Trial(policy, self._measure(policy, begin + width * run / _MAX_RUNS, width / _MAX_RUNS))
            trials.append(trial)
            error = trial.comparison.skip_ratio - self._wanted
            if abs(error) <= _CLOSE_ENOUGH:
                break
            lower, upper = (threshold, upper) if error > 0 else (lower, threshold)
            goal -= error
        return min(trials, key=lambda trial: abs(trial.comparison.skip_ratio - self._wanted))

    def _measure(self, policy: SkipPolicy, begin: float, width: float) -> Comparison:
        on_step = _counted(self._progress, f"trying {policy.label}", begin, begin + width, self._tokens)
        skipping = score(self._engine, self._passages, policy, reference=self._dense, on_step=on_step)
        return compare(self._dense, skipping, policy.warmup_tokens)


def _check_ratio(
    wanted: float, past_warmup: float, widest: SkipPolicy, layers: int, spans: Sequence[int | None], new_tokens: int
) -> None:
    """Raises PolicyError unless some candidate can skip ``wanted`` of all FFNs."""
    if not 0.0 < wanted < 1.0:
        raise PolicyError(f"the wanted skip ratio must lie in (0, 1), got {wanted}")
    reachable = past_warmup * max(reachable_ratio(replace(widest, span=span), layers) for span in spans)
    if wanted > reachable:
        raise PolicyError(
            f"a skip ratio of {wanted} cannot be reached: with cold_start={widest.cold_start}, "
            f"cold_end={widest.cold_end} and {widest.warmup_tokens} warm-up tokens, {new_tokens} generated tokens of "
            f"{layers} layers skip at most {reachable:.3f}"
        )


def _rank_of(trial: Trial, wanted_ratio: float) -> tuple[float, float]:
    """The wanted ratio first, then the least divergence from the dense model."""
    missed = abs(trial.comparison.skip_ratio - wanted_ratio)
    return max(0.0, missed - RATIO_TOLERANCE), trial.comparison.kl


def _counted(progress: Progress, stage: str, begin: float, end: float, total: int) -> Callable[[int], None]:
    """A counter of ``total`` units that reports them as the shares from ``begin`` to ``end``."""
    done = 0

    def count(units: int) -> None:
        nonlocal done
        done += units
        progress(stage, begin + (end - begin) * done / total)

    return count
