"""The search on landscapes whose best policy is known: a tuner that decodes nothing stands in for the real one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pytest

from skipkernels.calibration.policy_search import search
from skipkernels.calibration.scoring import Comparison
from skipkernels.calibration.search_space import SearchSpace
from skipkernels.calibration.simulation import tuned
from skipkernels.calibration.tuning import Trial, Tuner
from skipkernels.skipping.policy import SkipPolicy
from skipkernels.support.progress import Meter

LAYERS = 12
RATIO = 0.25
RNG = np.random.default_rng(0)
SIMILARITIES = (0.98 + RNG.normal(0, 0.008, (100, LAYERS))).clip(-1, 1).astype(np.float32)


@dataclass
class Landscape:
    """Every policy reaches the ratio; its KL is given by a formula."""

    kl: Callable[[SkipPolicy], float]
    wanted_ratio: float = RATIO
    tokens: int = 100
    decoded: list[SkipPolicy] = field(default_factory=list)
    similarities: np.ndarray = field(default_factory=lambda: SIMILARITIES)

    def on_part(self, passages: int) -> "Landscape":
        return Landscape(self.kl, self.wanted_ratio)

    def share_past_warmup(self, policy: SkipPolicy) -> float:
        return 1 - max(1, policy.warmup_tokens) / self.tokens

    def tune(self, policy: SkipPolicy, bias: float = 0.0, **limits: float) -> Trial:
        policy = tuned(self.similarities, policy, self.wanted_ratio / self.share_past_warmup(policy))
        self.decoded.append(policy)
        kl = self.kl(policy)
        comparison = Comparison(RATIO, RATIO, 1.0, kl, 1.0, 1.0, self.tokens)
        return Trial(policy, comparison, kl, self.wanted_ratio, 0.0)


def found(landscape: Landscape, space: SearchSpace, per_layer: bool = False) -> list[Trial]:
    return search(cast(Tuner, landscape), space, per_layer, Meter(lambda stage, share: None), 1.0)


def far_from(start: int, end: int, span: int, warmup: int = 1) -> Callable[[SkipPolicy], float]:
    def kl(policy: SkipPolicy) -> float:
        gated = LAYERS - policy.first_dense_layers - policy.last_dense_layers - 1
        away = (
            abs(policy.first_dense_layers - start)
            + abs(policy.last_dense_layers - end)
            + abs((policy.span or gated) - span)
        )
        return 0.01 * (1 + away + 0.1 * abs(policy.warmup_tokens - warmup))

    return kl


@pytest.mark.parametrize(("start", "end", "span"), [(2, 4, 3), (1, 2, 2), (3, 2, 4), (1, 6, 3)])
def test_moves_lead_to_the_best_shape(start: int, end: int, span: int) -> None:
    best, *_ = found(Landscape(far_from(start, end, span)), SearchSpace(LAYERS))
    assert (best.policy.first_dense_layers, best.policy.last_dense_layers, best.policy.span) == (start, end, span)


@pytest.mark.parametrize("warmup", [1, 8, 25])
def test_the_best_warm_up_is_taken(warmup: int) -> None:
    best, *_ = found(Landscape(far_from(2, 3, 4, warmup)), SearchSpace(LAYERS))
    assert best.policy.warmup_tokens == warmup


def test_a_given_warm_up_is_kept() -> None:
    trials = found(Landscape(far_from(2, 3, 4, 25)), SearchSpace(LAYERS, warmup_tokens=5))
    assert {trial.policy.warmup_tokens for trial in trials} == {5}


def test_a_given_window_and_span_are_kept() -> None:
    landscape = Landscape(far_from(5, 5, 5))
    space = SearchSpace(LAYERS, spans=(3,), first_dense_layers=2, last_dense_layers=4)
    assert {
        (t.policy.span, t.policy.first_dense_layers, t.policy.last_dense_layers) for t in found(landscape, space)
    } == {(3, 2, 4)}


def test_thresholds_per_layer_are_taken_where_they_help() -> None:
    """The less layer 5 triggers and the more layer 6 does, the better."""

    def kl(policy: SkipPolicy) -> float:
        if policy.layer_thresholds is None:
            return far_from(2, 3, 2)(policy)
        return 0.01 + policy.layer_thresholds[6] - policy.layer_thresholds[5]

    whole, *_ = found(Landscape(kl), SearchSpace(LAYERS))
    assert whole.policy.layer_thresholds is None
    best, second, *_ = found(Landscape(kl), SearchSpace(LAYERS), per_layer=True)
    assert best.policy.layer_thresholds is not None
    assert best.policy.layer_thresholds[5] > best.policy.layer_thresholds[6]
    assert best.cost < whole.cost
    assert second.policy == whole.policy


def test_thresholds_per_layer_that_do_not_help_are_left() -> None:
    def kl(policy: SkipPolicy) -> float:
        return far_from(2, 3, 2)(policy) + (0.01 if policy.layer_thresholds else 0.0)

    best, *_ = found(Landscape(kl), SearchSpace(LAYERS), per_layer=True)
    assert best.policy.layer_thresholds is None


def test_it_does_not_decode_without_end() -> None:
    landscape = Landscape(far_from(2, 3, 2))
    found(landscape, SearchSpace(LAYERS), per_layer=True)
    assert len(landscape.decoded) <= 8 + 6 * 8 + 4 + 2 * 2 * LAYERS


def test_the_same_input_gives_the_same_trials() -> None:
    runs = [found(Landscape(far_from(2, 3, 2, 8)), SearchSpace(LAYERS)) for _ in range(2)]
    assert runs[0] == runs[1]


def test_only_what_can_reach_the_ratio_is_decoded() -> None:
    landscape = Landscape(far_from(7, 3, 1), wanted_ratio=0.4)
    for trial in found(landscape, SearchSpace(LAYERS)):
        policy = replace(trial.policy, threshold=-1.0)
        assert policy.reachable_ratio(LAYERS) * landscape.share_past_warmup(policy) >= 0.39
