"""The search for the policy closest to the dense model at a wanted saving, over every kind.

Similarity policies are ranked by simulating the rule and adding up what each block that it skips costs alone, measured
token by token. The change of the residual stream (1 - similarity) does not rank them: on SmolLM2-135M block 28 changes
it as little as block 8 and costs five times as many nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from skipkernels.calibration.neuron_profile import NeuronProfile
from skipkernels.calibration.search_space import SearchSpace
from skipkernels.calibration.simulation import rank, tuned
from skipkernels.calibration.tuning import Decoder, Kind, Trial
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import FixedPolicy, Policy, RandomPolicy, SkipPolicy

SPLITS = (1.0, 1.3)
"""Gate thresholds over product thresholds, see ``NeuronProfile``: less leaves out products rather than gates."""
_SIMILARITY_TRIALS = 2
_BLOCK_SHARE = 0.25  # of the saving of a mixed policy that blocks bring
_SEED = 0


class Unreachable(PolicyError):
    """A kind cannot save so much."""


class Candidates:
    """Makes and tunes policies of every kind at one saving."""

    def __init__(self, decoder: Decoder, profile: NeuronProfile, space: SearchSpace, wanted: float) -> None:
        self._decoder = decoder
        self._profile = profile
        self._space = space
        self._wanted = wanted
        self._warmup = space.widest.warmup_tokens
        costs = profile.block_kl.mean(axis=0)
        self._cheapest = sorted(range(profile.layers), key=lambda layer: float(costs[layer]))

    def trials(self, kinds: Sequence[Kind]) -> list[Trial]:
        """Of the given kinds, the best first. Kinds that cannot save so much are left out.

        Raises:
            PolicyError: none can.
        """
        makers: dict[Kind, Callable[[], list[Trial]]] = {
            "neurons": self._neurons,
            "similarity": self._similarity,
            "mixed": self._mixed,
            "fixed": self._fixed,
            "random": self._random,
        }
        found: list[Trial] = []
        reasons: list[str] = []
        for kind in kinds:
            try:
                found += makers[kind]()
            except Unreachable as error:
                reasons.append(str(error))
        if not found:
            raise Unreachable("; ".join(reasons))
        return sorted(found, key=lambda trial: trial.rank)

    def _tune(self, kind: Kind, policy_at: Callable[[float], Policy]) -> Trial:
        return self._decoder.tune(kind, policy_at, self._wanted, self._warmup)

    def _neurons(self) -> list[Trial]:
        self._check_neurons("neurons: gate_proj is always read")
        return [self._tune("neurons", partial(self._neuron_policy, split)) for split in SPLITS]

    def _neuron_policy(self, split: float, saving: float) -> Policy:
        return self._profile.policy(saving, split, self._warmup)

    def _similarity(self) -> list[Trial]:
        past_warmup = self._decoder.share_past_warmup(self._warmup)
        ratio = self._wanted / past_warmup
        self._check(self._space.reachable_ratio, f"blocks by similarity: {self._space.label}")
        ranked = rank(self._profile.similarities, self._profile.block_kl, self._space.candidates(), ratio)
        if not ranked:
            raise Unreachable(f"no policy of blocks by similarity saves as little as {self._wanted:g} of the FFN bytes")
        return [
            self._tune("similarity", partial(tuned, self._profile.similarities, policy))
            for policy in ranked[:_SIMILARITY_TRIALS]
        ]

    def _mixed(self) -> list[Trial]:
        """The cheapest block left out for every token; or blocks by similarity; and neurons of all others."""
        layers, trials = self._profile.layers, []
        self._check_neurons("neurons beside blocks")
        if self._wanted * layers > 1:
            trials.append(self._tune("mixed", lambda saving: self._beside((self._cheapest[0],), saving)))
        part = _BLOCK_SHARE * self._wanted / self._decoder.share_past_warmup(self._warmup)
        blocks = rank(self._profile.similarities, self._profile.block_kl, self._space.candidates(), part)
        if blocks:
            trials.append(self._tune("mixed", lambda saving: self._with_neurons(blocks[0], saving - part)))
        return trials

    def _beside(self, removed: tuple[int, ...], saving: float) -> Policy:
        blocks = len(removed) / self._profile.layers
        return self._with_neurons(FixedPolicy(removed, self._warmup), (saving - blocks) / (1 - blocks))

    def _with_neurons(self, policy: SkipPolicy | FixedPolicy, saving: float) -> Policy:
        gates, products = self._profile.thresholds(max(0.0, saving), 1.0)
        scales = self._profile.listed_scales
        return replace(policy, gate_thresholds=gates, product_thresholds=products, up_scales=scales)

    def _fixed(self) -> list[Trial]:
        past_warmup = self._decoder.share_past_warmup(self._warmup)
        self._check(1.0, "fixed blocks")
        count = max(1, int(self._wanted / past_warmup * self._profile.layers + 0.5))
        policy = FixedPolicy(tuple(self._cheapest[:count]), self._warmup)
        return [self._decoder.try_out("fixed", policy, self._wanted, self._warmup)]

    def _random(self) -> list[Trial]:
        ratio = self._wanted / self._decoder.share_past_warmup(self._warmup)
        self._check(1.0, "random blocks")
        dense = 1 if ratio <= 1 - 2 / self._profile.layers else 0  # at each end
        policy = RandomPolicy(min(1.0, ratio), _SEED, dense, dense, self._warmup)
        return [self._decoder.try_out("random", policy, self._wanted, self._warmup)]

    def _check_neurons(self, what: str) -> None:
        if not self._profile.gates:
            raise Unreachable(f"{what}: single neurons of these weights cannot be left out")
        self._check(self._profile.most, what)

    def _check(self, reachable_past_warmup: float, what: str) -> None:
        reachable = reachable_past_warmup * self._decoder.share_past_warmup(self._warmup)
        if self._wanted > reachable:
            raise Unreachable(
                f"a saving of {self._wanted:g} of the FFN bytes cannot be reached by {what}, at most {reachable:.3f} "
                f"with a warm-up of {self._warmup}"
            )


def best_of_each_kind(trials: Sequence[Trial]) -> list[Trial]:
    """``trials`` are sorted."""
    best: dict[Kind, Trial] = {}
    for trial in trials:
        best.setdefault(trial.kind, trial)
    return list(best.values())
