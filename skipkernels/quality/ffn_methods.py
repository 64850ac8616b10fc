"""Methods that skip FFNs on the engine: the full model, FFN skip, and the two choices it has to be better than."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, cast

import numpy as np

from skipkernels.calibration import calibrate
from skipkernels.engine import Engine
from skipkernels.errors import PolicyError
from skipkernels.passages import Passage
from skipkernels.policy import DensePolicy, FixedPolicy, Policy, RandomPolicy, SkipPolicy, policy_from_dict
from skipkernels.quality.lengths import Lengths
from skipkernels.quality.matching import match, skip_ratio
from skipkernels.quality.method import Answer, Found, Method, OnItem, Progress, RatioOf, Reading, ignore
from skipkernels.quality.setup import Setup
from skipkernels.quality.work import Work
from skipkernels.scoring import Score, dense_similarities, score

_LOG_FACTOR = 9.0  # of the distance of a threshold from 1: more than its seven digits tell
_TOLERANCE = 0.01


class EngineMethod:
    """Decodes on the engine, ``max_batch_size`` rows together. ``policy_of`` gives the policy of each such batch."""

    def __init__(self, engine: Engine, policy_of: Callable[[int], Policy]) -> None:
        self._engine = engine
        self._policy_of = policy_of

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] | None = None,
        on_item: OnItem = ignore,
    ) -> list[Answer]:
        engine, answers = self._engine, []
        for number, start in enumerate(range(0, len(prompts), engine.max_batch_size)):
            batch = [list(prompt) for prompt in prompts[start : start + engine.max_batch_size]]
            generations = engine.generate(
                batch,
                max_new_tokens=max_new_tokens,
                stop=stop,
                eos_token_ids=eos_token_ids,
                policy=self._policy_of(number),
            )
            answers += [Answer(g.token_ids, g.text, self._work(g.skip_map)) for g in generations]
            on_item(len(batch))
        return answers

    def score(
        self,
        passages: Sequence[Passage],
        *,
        reference: Sequence[Reading] | None = None,
        keep_log_probs: bool = False,
        on_item: OnItem = ignore,
    ) -> list[Reading]:
        engine, readings = self._engine, []
        for number, start in enumerate(range(0, len(passages), engine.max_batch_size)):
            batch = slice(start, start + engine.max_batch_size)
            scores = score(
                engine,
                passages[batch],
                self._policy_of(number),
                # of a reference, only all_log_probs is looked at
                reference=None if reference is None else cast("Sequence[Score]", reference[batch]),
                keep_log_probs=keep_log_probs,
            )
            readings += [Reading(s.argmax, s.log_probs, s.kl, s.all_log_probs, self._work(s.skip_map)) for s in scores]
            on_item(len(scores))
        return readings

    def _work(self, skip_map: np.ndarray) -> Work:
        return Work.of_ffns(self._engine.config, self._engine.weights.dtype, skip_map)


class Full:
    """Every layer of every token."""

    name: ClassVar[str] = "full"
    source: ClassVar[str] = "the model itself, on the engine"
    ratio_of: ClassVar[RatioOf] = "nothing"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        return {"policy": DensePolicy().to_dict()}

    def build(self, setup: Setup, found: Found) -> Method:
        return EngineMethod(setup.engine, lambda batch: policy_from_dict(found["policy"]))


class FFNSkip:
    """FFN skip by similarity, its threshold, span and cold layers found by calibration."""

    name: ClassVar[str] = "skip"
    source: ClassVar[str] = "FFN-SkipLLM (Jaiswal et al. 2024, arXiv 2404.03865), calibrated by this package"
    ratio_of: ClassVar[RatioOf] = "FFN executions"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        Lengths.of(alike).share_past(ratio, setup.warmup_tokens)  # refuses what no policy reaches
        calibrated = setup.remember(f"calibration at {ratio}", lambda: self._calibrate(setup, ratio, progress))
        return {"policy": self._matched(setup, policy_from_dict(calibrated), ratio, alike, progress).to_dict()}

    def _calibrate(self, setup: Setup, ratio: float, progress: Progress) -> Found:
        calibration = calibrate(
            setup.engine,
            setup.texts,
            ratio,
            prompt_tokens=setup.prompt_tokens,
            new_tokens=setup.new_tokens,
            passages=setup.passages,
            warmup_tokens=setup.warmup_tokens,
            progress=progress,
        )
        return calibration.policy.to_dict()

    def _matched(
        self, setup: Setup, policy: Policy, ratio: float, alike: Sequence[Passage], progress: Progress
    ) -> SkipPolicy:
        """The policy with its thresholds moved, all by the same factor of their distance from 1."""
        assert isinstance(policy, SkipPolicy)

        def moved(log_factor: float) -> SkipPolicy:
            factor = math.exp(-log_factor)
            return replace(
                policy,
                threshold=_moved(policy.threshold, factor),
                layer_thresholds=policy.layer_thresholds and tuple(_moved(t, factor) for t in policy.layer_thresholds),
            )

        def measure(log_factor: float) -> float:
            chosen = moved(log_factor)
            return skip_ratio(EngineMethod(setup.engine, lambda batch: chosen).score(alike))

        log_factor, measured = match(measure, ratio, -_LOG_FACTOR, _LOG_FACTOR, progress)
        if measured < ratio - _TOLERANCE:
            raise PolicyError(
                f"a ratio of {ratio} cannot be reached: {policy.label}, calibrated on the text, skips at most "
                f"{measured:.3f} of generations of {Lengths.of(alike).label}"
            )
        return moved(log_factor)

    def build(self, setup: Setup, found: Found) -> Method:
        return EngineMethod(setup.engine, lambda batch: policy_from_dict(found["policy"]))


class RandomSkip:
    """Each FFN outside the first and the last layer is skipped with the same probability.

    A policy draws by token and layer, alike for all rows; every batch has a seed of its own, so that the result does
    not hang on one draw.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "random FFN skip, a baseline of FFN-SkipLLM (arXiv 2404.03865)"
    ratio_of: ClassVar[RatioOf] = "FFN executions"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        past_warmup = Lengths.of(alike).share_past(ratio, setup.warmup_tokens)
        policy = RandomPolicy(past_warmup, seed=setup.seed, warmup_tokens=setup.warmup_tokens)
        policy.plan(setup.engine.config.num_hidden_layers)  # refuses what it cannot reach
        return {"policy": policy.to_dict()}

    def build(self, setup: Setup, found: Found) -> Method:
        first = found["policy"]
        return EngineMethod(setup.engine, lambda batch: policy_from_dict(first | {"seed": first["seed"] + batch}))


class FixedSkip:
    """The same FFNs for every token: those of the highest mean similarity on the calibration text."""

    name: ClassVar[str] = "fixed"
    source: ClassVar[str] = "non-adaptive FFN skip, a baseline of FFN-SkipLLM (arXiv 2404.03865)"
    ratio_of: ClassVar[RatioOf] = "FFN executions"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        layers = setup.engine.config.num_hidden_layers
        count = round_half_up(Lengths.of(alike).share_past(ratio, setup.warmup_tokens) * layers)
        similarities = setup.remember("mean similarity", lambda: _mean_similarity(setup))
        chosen = sorted(range(layers), key=lambda layer: -similarities[layer])[:count]
        policy = FixedPolicy(tuple(chosen), warmup_tokens=setup.warmup_tokens)
        return {"policy": policy.to_dict()}

    def build(self, setup: Setup, found: Found) -> Method:
        return EngineMethod(setup.engine, lambda batch: policy_from_dict(found["policy"]))


def _mean_similarity(setup: Setup) -> list[float]:
    similarities = np.concatenate(list(dense_similarities(setup.engine, setup.text_passages)))
    return [round(value, 6) for value in similarities.mean(axis=0).tolist()]


def _moved(threshold: float, factor: float) -> float:
    return round(max(-1.0, 1.0 - (1.0 - threshold) * factor), 7)


def round_half_up(value: float) -> int:
    return int(value + 0.5)
