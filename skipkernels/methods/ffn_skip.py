"""What this package calibrates: neurons, blocks by FFN skip (arXiv 2404.03865), both; or a given policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from skipkernels.calibration.passages import Passage
from skipkernels.calibration.policy_search import Candidates
from skipkernels.calibration.search_space import SearchSpace
from skipkernels.calibration.tuning import Kind
from skipkernels.errors import PolicyError
from skipkernels.methods.engine_method import EngineMethod, PolicyKind
from skipkernels.methods.lengths import Lengths
from skipkernels.methods.matching import match, skip_ratio
from skipkernels.methods.method import Found, Progress, RatioOf, ignore
from skipkernels.methods.setup import Setup
from skipkernels.skipping.policy import FixedPolicy, NeuronPolicy, Policy, SkipPolicy, policy_from_dict

_LOG_FACTOR = 9.0  # bound on the logarithm of the factor by which thresholds are scaled
_TOLERANCE = 0.01
_HEADROOM = 0.05


class CalibratedSkip(PolicyKind):
    """The best policy of one kind at the ratio, its thresholds tuned to the measured texts."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    ratio_of: ClassVar[RatioOf] = "FFN bytes"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        past_warmup = Lengths.of(alike).share_past(ratio, setup.warmup_tokens)
        try:
            policy = self._fitted(setup, self._calibrated(setup, ratio, progress), ratio, alike, progress)
        except PolicyError:
            # short answers have to make up for their warm-up, and a controller needs headroom: the best policy at this
            # ratio may not be able to save that much
            higher = round(max(past_warmup, ratio + _HEADROOM), 3)
            policy = self._fitted(setup, self._calibrated(setup, higher, progress), ratio, alike, progress)
        return {"policy": policy.to_dict()}

    def _calibrated(self, setup: Setup, ratio: float, progress: Progress) -> Policy:
        """The policy that calibration's search finds on the text of the setup; cached."""

        def search() -> Found:
            progress(f"tuning {self.kind}", 0.0)
            space = SearchSpace(setup.engine.config.num_hidden_layers, warmup_tokens=setup.warmup_tokens)
            candidates = Candidates(setup.decoder, setup.neuron_profile, space, ratio)
            return candidates.trials([self.kind])[0].policy.to_dict()

        return policy_from_dict(setup.remember(f"calibration of {self.kind} at {ratio}", search))

    def _fitted(
        self, setup: Setup, policy: Policy, ratio: float, alike: Sequence[Passage], progress: Progress
    ) -> Policy:
        """The policy with its thresholds moved so that it saves ``ratio``."""

        def measure(log_factor: float) -> float:
            chosen = moved(policy, log_factor)
            return skip_ratio(EngineMethod(setup.engine, lambda batch: chosen).score(alike))

        log_factor, measured = match(measure, ratio, -_LOG_FACTOR, _LOG_FACTOR, progress)
        if measured < ratio - _TOLERANCE:
            raise PolicyError(
                f"a ratio of {ratio} cannot be reached: {policy.label}, calibrated on the text, saves at most "
                f"{measured:.3f} of generations of {Lengths.of(alike).label}"
            )
        return moved(policy, log_factor)


class FFNSkip(CalibratedSkip):
    """FFN skip by similarity."""

    name: ClassVar[str] = "skip"
    kind: ClassVar[Kind] = "similarity"
    source: ClassVar[str] = "FFN-SkipLLM (Jaiswal et al. 2024, arXiv 2404.03865), calibrated by this package"


class NeuronSkip(CalibratedSkip):
    """Single neurons, thresholds per layer of gates and of products."""

    name: ClassVar[str] = "neuron"
    kind: ClassVar[Kind] = "neurons"
    source: ClassVar[str] = "neurons below thresholds, allotted by this package over layers, gates and products"


class MixedSkip(CalibratedSkip):
    """Neurons beside whole blocks."""

    name: ClassVar[str] = "mixed"
    kind: ClassVar[Kind] = "mixed"
    source: ClassVar[str] = "neurons beside blocks, allotted by this package"


class HeldSkip(NeuronSkip):
    """Neurons whose share the controller holds in every row, starting from the calibrated policy."""

    name: ClassVar[str] = "held"
    source: ClassVar[str] = "neurons below thresholds, the share of bytes held by this package's controller"

    def _fitted(
        self, setup: Setup, policy: Policy, ratio: float, alike: Sequence[Passage], progress: Progress
    ) -> Policy:
        assert isinstance(policy, NeuronPolicy)
        held = replace(policy, target_ratio=ratio)
        held.plan(setup.engine.config.num_hidden_layers)  # raises if the ratio cannot be held
        return held


class CatsSkip(CalibratedSkip):
    """The same share of every layer's gates."""

    name: ClassVar[str] = "cats"
    kind: ClassVar[Kind] = "neurons"
    source: ClassVar[str] = "CATS (Lee et al. 2024, arXiv 2404.08763), without its fine-tuning"

    def _calibrated(self, setup: Setup, ratio: float, progress: Progress) -> Policy:
        found = setup.remember(
            f"gates at {ratio}",
            lambda: setup.neuron_profile.uniform_gates(ratio, setup.warmup_tokens).to_dict(),
        )
        return policy_from_dict(found)


class GivenPolicy(PolicyKind):
    """A policy that was calibrated before, with another warm-up. Its name is that of the method of its grain."""

    source: ClassVar[str] = "a policy file"
    ratio_of: ClassVar[RatioOf] = "FFN bytes"

    def __init__(self, policy: Policy, warmup_tokens: int) -> None:
        self.name = grain(policy)
        values = policy.to_dict()
        self._values = values | {"warmup_tokens": warmup_tokens} if "warmup_tokens" in values else values

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        return {"policy": self._values}

    def ratio(self, setup: Setup) -> float:
        """The share of FFN bytes it saves on the text of the setup."""
        method = self.build(setup, {"policy": self._values})
        return round(skip_ratio(method.score(setup.text_passages)), 3)


def grain(policy: Policy) -> str:
    """The name of the method that a policy is one of.

    Raises:
        PolicyError: none has policies of this kind.
    """
    neurons = bool(getattr(policy, "has_neuron_rule", False))
    names: dict[tuple[str, bool], str] = {
        ("neurons", True): NeuronSkip.name,
        ("similarity", False): FFNSkip.name,
        ("similarity", True): MixedSkip.name,
        ("fixed", True): MixedSkip.name,
        ("fixed", False): "fixed",
        ("random", False): "random",
    }
    if (policy.kind, neurons) not in names:
        raise PolicyError(f"no method has policies of kind {policy.kind!r}")
    return names[policy.kind, neurons]


def moved(policy: Policy, log_factor: float) -> Policy:
    """``policy`` with its thresholds moved to save less, the larger ``log_factor`` is: neurons' are scaled; where
    it has none, the distance of those of similarity from 1 is."""
    factor = math.exp(-log_factor)
    if isinstance(policy, NeuronPolicy | SkipPolicy | FixedPolicy) and policy.has_neuron_rule:
        scaled: dict[str, Any] = {
            name: tuple(threshold * factor for threshold in getattr(policy, name))
            for name in ("gate_thresholds", "product_thresholds")
        }
        return replace(policy, **scaled)
    assert isinstance(policy, SkipPolicy)
    return replace(
        policy,
        threshold=_moved(policy.threshold, factor),
        layer_thresholds=policy.layer_thresholds and tuple(_moved(t, factor) for t in policy.layer_thresholds),
    )


def _moved(threshold: float, factor: float) -> float:
    return round(max(-1.0, 1.0 - (1.0 - threshold) * factor), 7)
