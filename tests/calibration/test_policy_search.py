"""The search where the best policy is known: a decoder that decodes nothing stands in for the real one."""

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
import torch

from skipkernels.calibration.neuron_profile import NeuronProfile
from skipkernels.calibration.policy_search import Candidates, best_of_each_kind
from skipkernels.calibration.scoring import Comparison
from skipkernels.calibration.search_space import SearchSpace
from skipkernels.calibration.tuning import KINDS, Decoder, Kind, Trial
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import FixedPolicy, NeuronPolicy, Policy, RandomPolicy, SkipPolicy
from skipkernels.skipping.up_scales import UpScales

LAYERS = 12
BLOCK_KL = np.tile(np.array([5, 0.3, 0.3, 0.1, 0.2, 0.1, 0.2, 0.2, 0.3, 0.3, 2, 9], np.float32), (64, 1))
"""The last two are the most expensive, and change the stream as little as any."""
SIMILARITIES = (
    np.tile(np.array([0.9, *[0.97] * 6, 0.98, 0.98, 0.99, 0.995, 0.999], np.float32), (64, 1))
    + np.random.default_rng(0).normal(0, 1e-3, (64, LAYERS)).astype(np.float32)
).clip(-1, 1)


def profile() -> NeuronProfile:
    samples = [torch.rand(500, 4, generator=torch.Generator().manual_seed(layer)) for layer in range(LAYERS)]
    scales = UpScales.of([(1.0,) * 4] * LAYERS)
    return NeuronProfile(samples, samples, scales, [1.0] * LAYERS, BLOCK_KL, SIMILARITIES)


class Landscape:
    """Every policy saves what is wanted; its KL is given by its kind."""

    def __init__(self, kl: Callable[[Kind, Policy], float], warmup_share: float = 1.0) -> None:
        self._kl = kl
        self._share = warmup_share

    def share_past_warmup(self, warmup_tokens: int) -> float:
        return self._share

    def try_out(self, kind: Kind, policy: Policy, wanted: float, warmup_tokens: int) -> Trial:
        policy.plan(LAYERS)
        kl = self._kl(kind, policy)
        return Trial(kind, policy, Comparison(wanted, wanted, 1.0, kl, 1.0, 1.0, 100, LAYERS), (kl, kl), wanted)

    def tune(self, kind: Kind, policy_at: Callable[[float], Policy], wanted: float, warmup_tokens: int) -> Trial:
        return self.try_out(kind, policy_at(wanted / self._share), wanted, warmup_tokens)


def found(landscape: Landscape, wanted: float = 0.25, kinds: tuple[Kind, ...] = KINDS, **space: object) -> list[Trial]:
    candidates = Candidates(cast(Decoder, landscape), profile(), SearchSpace(LAYERS, **space), wanted)
    return candidates.trials(kinds)


@pytest.mark.parametrize("best", KINDS)
def test_whatever_kind_is_best_is_first(best: Kind) -> None:
    trials = found(Landscape(lambda kind, policy: 0.1 if kind == best else 0.2))
    assert trials[0].kind == best
    assert {trial.kind for trial in best_of_each_kind(trials)} == set(KINDS)
    assert best_of_each_kind(trials)[0] == trials[0]


def test_every_kind_is_what_it_says() -> None:
    for trial in found(Landscape(lambda kind, policy: 0.1)):
        neurons = getattr(trial.policy, "has_neuron_rule", False)
        assert neurons == (trial.kind in ("neurons", "mixed"))
        kinds = {"neurons": NeuronPolicy, "similarity": SkipPolicy, "fixed": FixedPolicy, "random": RandomPolicy}
        assert isinstance(trial.policy, kinds.get(trial.kind, SkipPolicy | FixedPolicy))


def test_fixed_takes_the_blocks_that_cost_least() -> None:
    (trial,) = found(Landscape(lambda kind, policy: 0.1), kinds=("fixed",))
    assert isinstance(trial.policy, FixedPolicy)
    assert set(trial.policy.layers) <= {3, 4, 5, 6, 7}
    assert {3, 5} < set(trial.policy.layers)
    assert len(trial.policy.layers) == 3


def test_similarity_leaves_the_last_blocks_alone_though_they_change_the_stream_least() -> None:
    """Ranked by the change of the stream, as before, the last blocks would come first."""
    for trial in found(Landscape(lambda kind, policy: 0.1), kinds=("similarity",)):
        gated = trial.policy.plan(LAYERS).gated_layers
        assert not {10, 11} & set(gated)


def test_a_kind_that_cannot_save_so_much_is_left_out_and_the_reachable_is_named() -> None:
    kinds = {trial.kind for trial in found(Landscape(lambda kind, policy: 0.1), wanted=0.7)}
    assert kinds == {"similarity", "fixed", "random"}
    with pytest.raises(PolicyError, match=r"0\.7 of the FFN bytes cannot be reached by neurons.* at most 0\.667"):
        found(Landscape(lambda kind, policy: 0.1), wanted=0.7, kinds=("neurons",))
    with pytest.raises(PolicyError, match=r"at most 0\.500 with a warm-up of 4"):
        found(Landscape(lambda kind, policy: 0.1, warmup_share=0.5), wanted=0.6, warmup_tokens=4)


def test_a_given_window_and_span_are_kept() -> None:
    trials = found(
        Landscape(lambda kind, policy: 0.1),
        kinds=("similarity",),
        spans=(3,),
        first_dense_layers=2,
        last_dense_layers=4,
        warmup_tokens=5,
    )
    shapes = {(t.policy.span, t.policy.first_dense_layers, t.policy.last_dense_layers) for t in trials}
    assert shapes == {(3, 2, 4)}
    assert {trial.policy.warmup_tokens for trial in trials} == {5}


def test_the_same_input_gives_the_same_trials() -> None:
    runs = [found(Landscape(lambda kind, policy: 0.1)) for _ in range(2)]
    assert runs[0] == runs[1]
