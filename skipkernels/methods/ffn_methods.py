"""The full model, and the two baselines of FFN skip: random and fixed FFNs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from skipkernels.calibration.passages import Passage
from skipkernels.methods.engine_method import EngineMethod, PolicyKind
from skipkernels.methods.lengths import Lengths
from skipkernels.methods.method import FULL, Found, Method, Progress, RatioOf, ignore
from skipkernels.methods.setup import Setup
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, RandomPolicy, policy_from_dict


class Full(PolicyKind):
    """Every layer of every token."""

    name: ClassVar[str] = FULL
    source: ClassVar[str] = "the model itself, on the engine"
    ratio_of: ClassVar[RatioOf] = "nothing"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        return {"policy": DensePolicy().to_dict()}


class RandomSkip:
    """Each FFN outside the first and the last layer is skipped with the same probability.

    A policy draws by token and layer, the same for all rows; every batch has its own seed, so that the result does not
    depend on a single draw.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "random FFN skip, a baseline of FFN-SkipLLM (arXiv 2404.03865)"
    ratio_of: ClassVar[RatioOf] = "FFN bytes"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        past_warmup = Lengths.of(alike).share_past(ratio, setup.warmup_tokens)
        policy = RandomPolicy(past_warmup, seed=setup.seed, warmup_tokens=setup.warmup_tokens)
        policy.plan(setup.engine.config.num_hidden_layers)  # raises if the ratio cannot be reached
        return {"policy": policy.to_dict()}

    def build(self, setup: Setup, found: Found) -> Method:
        first = found["policy"]
        return EngineMethod(setup.engine, lambda batch: policy_from_dict(first | {"seed": first["seed"] + batch}))


class FixedSkip(PolicyKind):
    """The same FFNs for every token: those that cost least alone on the calibration text."""

    name: ClassVar[str] = "fixed"
    source: ClassVar[str] = "non-adaptive FFN skip, a baseline of FFN-SkipLLM (arXiv 2404.03865)"
    ratio_of: ClassVar[RatioOf] = "FFN bytes"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        layers = setup.engine.config.num_hidden_layers
        count = round_half_up(Lengths.of(alike).share_past(ratio, setup.warmup_tokens) * layers)
        costs = setup.remember("cost of each block", lambda: setup.neuron_profile.block_kl.mean(axis=0).tolist())
        chosen = sorted(range(layers), key=lambda layer: costs[layer])[:count]
        policy = FixedPolicy(tuple(chosen), warmup_tokens=setup.warmup_tokens)
        return {"policy": policy.to_dict()}


def round_half_up(value: float) -> int:
    return int(value + 0.5)
