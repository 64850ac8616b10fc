"""Methods that skip FFNs on the engine: the full model, FFN skip, and the two choices it has to be better than."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import numpy as np

from skipkernels.calibration import calibrate
from skipkernels.engine import Engine
from skipkernels.passages import Passage
from skipkernels.policy import DensePolicy, FixedPolicy, Policy, RandomPolicy, policy_from_dict
from skipkernels.quality.lengths import Lengths
from skipkernels.quality.method import Answer, Found, Method, OnItem, Progress, RatioOf, Reading, ignore
from skipkernels.quality.setup import Setup
from skipkernels.quality.work import Work
from skipkernels.scoring import Score, dense_similarities, score


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

    def find(self, setup: Setup, ratio: float, lengths: Lengths, progress: Progress = ignore) -> Found:
        return {"policy": DensePolicy().to_dict()}

    def build(self, setup: Setup, found: Found) -> Method:
        return EngineMethod(setup.engine, lambda batch: policy_from_dict(found["policy"]))


class FFNSkip:
    """FFN skip by similarity, its threshold, span and cold layers found by calibration."""

    name: ClassVar[str] = "skip"
    source: ClassVar[str] = "FFN-SkipLLM (Jaiswal et al. 2024, arXiv 2404.03865), calibrated by this package"
    ratio_of: ClassVar[RatioOf] = "FFN executions"

    def find(self, setup: Setup, ratio: float, lengths: Lengths, progress: Progress = ignore) -> Found:
        new_tokens = max(lengths.typical, setup.warmup_tokens + 1)
        past_warmup = lengths.share_past(ratio, setup.warmup_tokens)
        calibration = calibrate(
            setup.engine,
            setup.texts,
            past_warmup * (1 - setup.warmup_tokens / new_tokens),
            prompt_tokens=setup.prompt_tokens,
            new_tokens=new_tokens,
            passages=setup.passage_count(new_tokens),
            warmup_tokens=setup.warmup_tokens,
            progress=progress,
        )
        return {"policy": calibration.policy.to_dict(), "calibrated_ratio": calibration.held_out.skip_ratio}

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

    def find(self, setup: Setup, ratio: float, lengths: Lengths, progress: Progress = ignore) -> Found:
        past_warmup = lengths.share_past(ratio, setup.warmup_tokens)
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

    def find(self, setup: Setup, ratio: float, lengths: Lengths, progress: Progress = ignore) -> Found:
        layers = setup.engine.config.num_hidden_layers
        count = round_half_up(lengths.share_past(ratio, setup.warmup_tokens) * layers)
        passages = setup.search_passages(lengths.typical)
        similarities = np.concatenate(list(dense_similarities(setup.engine, passages)))
        chosen = np.argsort(-similarities.mean(axis=0), kind="stable")[:count]
        policy = FixedPolicy(tuple(chosen.tolist()), warmup_tokens=setup.warmup_tokens)
        return {"policy": policy.to_dict()}

    def build(self, setup: Setup, found: Found) -> Method:
        return EngineMethod(setup.engine, lambda batch: policy_from_dict(found["policy"]))


def round_half_up(value: float) -> int:
    return int(value + 0.5)
