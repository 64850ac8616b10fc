"""Verification: baselines that skip as much, and a verdict only where chance is ruled out."""

from dataclasses import replace

import numpy as np
import pytest

from skipkernels.calibration.passages import Passage
from skipkernels.calibration.verification import DECODES, Margin, Verification, verify
from skipkernels.engine import Engine
from skipkernels.skipping.policy import FixedPolicy, RandomPolicy, SkipPolicy
from tests.models import random_prompt, tiny_engine, tiny_module

LAYERS, NEW_TOKENS = 8, 24
MEAN_SIMILARITY = [0.1, 0.5, 0.9, 0.96, 0.97, 0.95, 0.94, 0.2]  # best first: 4, 3, 5, 6, 2, 1, 7, 0
PASSAGES = [Passage(tuple(random_prompt(8 + NEW_TOKENS, seed)), 8) for seed in range(6)]
POLICY = SkipPolicy(threshold=0.97, span=2, first_dense_layers=1, last_dense_layers=1, warmup_tokens=4)


def engine() -> Engine:
    return tiny_engine(module=tiny_module(num_hidden_layers=LAYERS), max_batch_size=6)


def verified(policy: SkipPolicy) -> Verification:
    return verify(engine(), PASSAGES, policy, MEAN_SIMILARITY, lambda tokens: None)


def test_the_fixed_baseline_skips_just_as_much() -> None:
    result = verified(POLICY)
    fewer, more, random = result.baselines
    wanted = result.held_out.skip_ratio_past_warmup * LAYERS
    assert 0 < wanted % 1 < 1
    best_first = (4, 3, 5, 6, 2, 1, 7, 0)
    assert fewer.policy == FixedPolicy(best_first[: int(wanted)], warmup_tokens=4)
    assert more.policy == FixedPolicy(best_first[: int(wanted) + 1], warmup_tokens=4)
    assert fewer.comparison.skip_ratio < result.held_out.skip_ratio < more.comparison.skip_ratio
    assert result.margins[0].skip_ratio == pytest.approx(result.held_out.skip_ratio)
    assert isinstance(random.policy, RandomPolicy)
    assert random.policy.ratio == result.held_out.skip_ratio_past_warmup
    assert random.comparison.skip_ratio == pytest.approx(result.held_out.skip_ratio, abs=0.1)  # 20 draws of 6 layers
    assert result.margins[1].skip_ratio == random.comparison.skip_ratio


def test_a_margin_is_the_difference_of_the_mean_kl_of_all_tokens() -> None:
    result = verified(POLICY)
    past = 1 - 4 / NEW_TOKENS
    ours, fewer, more, random = (
        comparison.kl * past for comparison in (result.held_out, *(b.comparison for b in result.baselines))
    )
    share = result.held_out.skip_ratio_past_warmup * LAYERS % 1
    fixed, chance = result.margins
    assert (fixed.against, chance.against) == ("fixed", "random")
    assert fixed.kl == pytest.approx((1 - share) * fewer + share * more - ours, rel=1e-4)  # fp32 sums
    assert chance.kl == pytest.approx(random - ours, rel=1e-4)
    for margin in result.margins:
        assert margin.low <= margin.kl <= margin.high
    assert verified(POLICY) == result


def test_a_policy_that_always_skips_the_fixed_layers_is_level_with_them() -> None:
    always = replace(POLICY, threshold=-1.0, span=3, first_dense_layers=2, last_dense_layers=2)  # skips 3, 4 and 5
    result = verified(always)
    assert result.baselines[0].policy == FixedPolicy((3, 4, 5), warmup_tokens=4)
    fixed = result.margins[0]
    assert (fixed.kl, fixed.low, fixed.high) == pytest.approx((0, 0, 0), abs=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.03, "beats"), (-0.01, 0.03, "is level with"), (-0.03, -0.01, "loses to"), (0.0, 0.0, "is level with")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Margin("fixed", 0.25, 0.01, low, high).verdict == verdict


def test_what_skips_nothing_is_level_with_everything() -> None:
    result = verified(replace(POLICY, threshold=1.0))
    assert result.held_out.skip_ratio == 0.0
    assert {margin.verdict for margin in result.margins} == {"is level with"}
    assert [margin.kl for margin in result.margins] == pytest.approx([0, 0], abs=1e-6)


def test_steps_are_counted() -> None:
    steps: list[int] = []
    verify(engine(), PASSAGES, POLICY, MEAN_SIMILARITY, steps.append)
    assert sum(steps) == DECODES * len(PASSAGES) * NEW_TOKENS


def test_a_layer_that_all_tokens_skip_bounds_nothing() -> None:
    """More layers than the random choice's dense layers leave: it then has none."""
    nearly_all = replace(POLICY, threshold=-1.0, span=None, first_dense_layers=0, last_dense_layers=0)
    random = verified(nearly_all).baselines[-1].policy
    assert isinstance(random, RandomPolicy)
    assert np.isclose(random.ratio, (LAYERS - 1) / LAYERS)
    assert (random.first_dense_layers, random.last_dense_layers) == (0, 0)
