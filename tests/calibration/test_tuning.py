"""Tuning: the wanted ratio by decoding, and costs that can be compared."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from skipkernels.calibration.passages import cut_passages
from skipkernels.calibration.scoring import Comparison, dense_similarities
from skipkernels.calibration.simulation import simulate
from skipkernels.calibration.tuning import CLOSE, Trial, Tuner
from skipkernels.engine import Engine
from skipkernels.skipping.policy import SkipPolicy
from tests.models import byte_tokenizer, random_prompt, tiny_engine, tiny_module

LAYERS, PASSAGES, NEW_TOKENS = 10, 6, 40
POLICY = SkipPolicy(span=2, first_dense_layers=2, warmup_tokens=5)


def engine() -> Engine:
    module = tiny_module(num_hidden_layers=LAYERS)
    return tiny_engine(module=module, max_batch_size=PASSAGES, tokenizer=byte_tokenizer())


def tuner(wanted_ratio: float, on_step: Callable[[int], None] = lambda tokens: None) -> Tuner:
    loaded = engine()
    passages, _ = cut_passages(loaded, [random_prompt(2000)], 2 * PASSAGES, 8, NEW_TOKENS)
    similarities = np.concatenate(list(dense_similarities(loaded, passages)))
    return Tuner(loaded, passages, similarities, wanted_ratio, on_step)


def trial(ratio: float, kl: float) -> Trial:
    return Trial(POLICY, Comparison(ratio, ratio, 1.0, kl, 1.0, 1.0, 100), kl, wanted_ratio=0.25, bias=0.0)


@pytest.mark.parametrize("policy", [POLICY, replace(POLICY, layer_thresholds=(0.95,) * LAYERS)])
def test_the_ratio_is_reached(policy: SkipPolicy) -> None:
    found = tuner(0.3).tune(policy)
    assert found.missed <= CLOSE
    assert found.comparison.skip_ratio == pytest.approx(0.3, abs=CLOSE)
    assert (found.policy.span, found.policy.first_dense_layers, found.policy.warmup_tokens) == (2, 2, 5)
    assert (found.policy.layer_thresholds is None) == (policy.layer_thresholds is None)


def test_the_cost_counts_the_warm_up_too() -> None:
    tuned = tuner(0.2)
    found = tuned.tune(POLICY)
    assert tuned.share_past_warmup(POLICY) == 1 - 5 / NEW_TOKENS
    assert found.kl == pytest.approx(found.comparison.kl * (1 - 5 / NEW_TOKENS), rel=1e-5)  # fp32 sums


def test_the_bias_is_what_the_simulation_got_wrong() -> None:
    tuned = tuner(0.3)
    found = tuned.tune(POLICY)
    simulated = simulate(tuned.similarities, found.policy).mean() * tuned.share_past_warmup(POLICY)
    assert found.bias == pytest.approx(found.comparison.skip_ratio - simulated, abs=1e-3)  # of 2,400 FFNs
    steps: list[int] = []
    tuner(0.3, steps.append).tune(POLICY, found.bias)
    assert sum(steps) == 2 * PASSAGES * NEW_TOKENS  # dense, and one decode that was right at once


def test_what_cannot_reach_the_ratio_is_decoded_once() -> None:
    steps: list[int] = []
    found = tuner(0.6, steps.append).tune(replace(POLICY, first_dense_layers=6))
    assert found.policy.threshold == -1.0
    assert found.comparison.skip_ratio == pytest.approx(2 / LAYERS * (1 - 5 / NEW_TOKENS))
    assert sum(steps) == 2 * PASSAGES * NEW_TOKENS


def test_a_part_is_compared_with_its_own_dense_scores() -> None:
    """A policy that skips nothing is no way from the dense model."""
    part = tuner(0.3).on_part(3)
    assert part.tokens == 3 * NEW_TOKENS
    found = part.tune(replace(POLICY, threshold=1.0, layer_thresholds=(1.0,) * LAYERS), runs=1)
    assert found.comparison.skip_ratio == 0.0
    assert found.kl == pytest.approx(0.0, abs=1e-6)


def test_trials_rank_by_ratio_then_by_kl_at_the_ratio() -> None:
    assert trial(0.25, 0.03).cost == 0.03
    assert trial(0.245, 0.03).cost > 0.03 > trial(0.255, 0.03).cost
    assert trial(0.0, 0.0).cost == math.inf
    worst_first = [trial(0.1, 0.0), trial(0.2, 0.001), trial(0.25, 0.03), trial(0.245, 0.02), trial(0.25, 0.02)]
    assert sorted(worst_first, key=lambda t: t.rank) == worst_first[::-1]
