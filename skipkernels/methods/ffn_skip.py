"""FFN skip (Jaiswal et al. 2024, arXiv 2404.03865), with a calibrated or a given policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from skipkernels.calibration.calibration import calibrate
from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError
from skipkernels.methods.engine_method import EngineMethod, PolicyKind
from skipkernels.methods.lengths import Lengths
from skipkernels.methods.matching import match, skip_ratio
from skipkernels.methods.method import Found, Progress, RatioOf, ignore
from skipkernels.methods.setup import Setup
from skipkernels.skipping.policy import Policy, SkipPolicy, policy_from_dict

_LOG_FACTOR = 9.0  # bound on the logarithm of the factor by which a threshold's distance from 1 is scaled
_TOLERANCE = 0.01
_HEADROOM = 0.05


class FFNSkip(PolicyKind):
    """FFN skip by similarity: span and dense layers from calibration, the threshold tuned to the ratio."""

    name: ClassVar[str] = "skip"
    source: ClassVar[str] = "FFN-SkipLLM (Jaiswal et al. 2024, arXiv 2404.03865), calibrated by this package"
    ratio_of: ClassVar[RatioOf] = "FFN executions"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        past_warmup = Lengths.of(alike).share_past(ratio, setup.warmup_tokens)
        try:
            policy = self._fitted(setup, _calibrated(setup, ratio, progress), ratio, alike, progress)
        except PolicyError:
            # short answers have to make up for their warm-up, and a controller needs headroom: the best policy at this
            # ratio may not be able to skip that much
            higher = round(max(past_warmup, ratio + _HEADROOM), 3)
            policy = self._fitted(setup, _calibrated(setup, higher, progress), ratio, alike, progress)
        return {"policy": policy.to_dict()}

    def _fitted(
        self, setup: Setup, policy: SkipPolicy, ratio: float, alike: Sequence[Passage], progress: Progress
    ) -> SkipPolicy:
        """The policy with the distance of its thresholds from 1 scaled so that it skips ``ratio``."""

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


class HeldSkip(FFNSkip):
    """FFN skip whose ratio the controller in the gate holds in every row, starting from the calibrated policy."""

    name: ClassVar[str] = "held"
    source: ClassVar[str] = "FFN-SkipLLM (arXiv 2404.03865), its ratio held by this package's controller"

    def _fitted(
        self, setup: Setup, policy: SkipPolicy, ratio: float, alike: Sequence[Passage], progress: Progress
    ) -> SkipPolicy:
        held = replace(policy, target_ratio=ratio)
        held.plan(setup.engine.config.num_hidden_layers)  # raises if the ratio cannot be held
        return held


class GivenPolicy(PolicyKind):
    """A policy that was calibrated before, with another warm-up."""

    name: ClassVar[str] = "skip"
    source: ClassVar[str] = "FFN-SkipLLM (Jaiswal et al. 2024, arXiv 2404.03865), a policy file"
    ratio_of: ClassVar[RatioOf] = "FFN executions"

    def __init__(self, policy: Policy, warmup_tokens: int) -> None:
        values = policy.to_dict()
        self._values = values | {"warmup_tokens": warmup_tokens} if "warmup_tokens" in values else values

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        return {"policy": self._values}

    def ratio(self, setup: Setup) -> float:
        """Its skip ratio on the text of the setup."""
        method = self.build(setup, {"policy": self._values})
        return round(skip_ratio(method.score(setup.text_passages)), 3)


def _calibrated(setup: Setup, ratio: float, progress: Progress) -> SkipPolicy:
    """The policy that calibration finds on the text of the setup; cached."""

    def search() -> Found:
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

    policy = policy_from_dict(setup.remember(f"calibration at {ratio}", search))
    assert isinstance(policy, SkipPolicy)
    return policy


def _moved(threshold: float, factor: float) -> float:
    return round(max(-1.0, 1.0 - (1.0 - threshold) * factor), 7)
