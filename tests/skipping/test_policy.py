"""Policies: what they plan, what they refuse, and what they skip."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest

from skipkernels.decoding.generation import Generation
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import (
    DensePolicy,
    FixedPolicy,
    Policy,
    RandomPolicy,
    SkipPolicy,
    TimingPolicy,
    policy_from_dict,
)
from tests.models import random_prompt, tiny_engine, tiny_module

PROMPT = random_prompt(6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.01}, r"threshold must be a cosine similarity in \[-1, 1\], got 1.01"),
        ({"threshold": -1.5}, "got -1.5"),
        ({"threshold": math.nan}, "got nan"),
        ({"layer_thresholds": (0.5, math.nan)}, "got nan"),
        ({"span": 0}, "span must be at least 1 layer .*, got 0"),
        ({"span": -3}, "got -3"),
        ({"first_dense_layers": -1}, "first_dense_layers must not be negative, got -1"),
        ({"last_dense_layers": -1}, "last_dense_layers must not be negative"),
        ({"warmup_tokens": -1}, "warmup_tokens must not be negative"),
        ({"batch_rule": "some"}, "batch_rule must be one of per_row, all, majority, got 'some'"),
    ],
)
def test_an_impossible_rule_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        SkipPolicy(**settings)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RandomPolicy(ratio=1.1), r"must lie in \[0, 1\], got 1.1"),
        (lambda: RandomPolicy(ratio=math.nan), "got nan"),
        (lambda: RandomPolicy(ratio=0.2, seed=2**63), "seed must be a 64-bit integer"),
        (lambda: FixedPolicy(layers=(1,), warmup_tokens=-1), "warmup_tokens must not be negative"),
        (
            lambda: RandomPolicy(ratio=0.9).plan(4),
            "cannot be reached: first_dense_layers=1 and last_dense_layers=1 leave at most 0.500",
        ),
        (lambda: FixedPolicy(layers=(1, 4)).plan(4), r"fixed layer 4 is outside 0\.\.3"),
        (lambda: FixedPolicy(layers=(-1,)).plan(4), "fixed layer -1 is outside"),
        (lambda: TimingPolicy(ratio=1.0), r"must lie in \[0, 1\), got 1.0"),
        (lambda: TimingPolicy(ratio=0.9).plan(4), "leaves no layer that could trigger"),
        (
            lambda: SkipPolicy(first_dense_layers=2, last_dense_layers=1).plan(4),
            "leave nothing to skip .* must be at most 2",
        ),
        (lambda: SkipPolicy(first_dense_layers=9).plan(4), "leave nothing to skip in a model of 4 layers"),
        (lambda: SkipPolicy(layer_thresholds=(0.5,) * 3).plan(4), "has 3 entries, the model 4 layers"),
    ],
)
def test_a_policy_that_does_not_fit_the_model_is_refused(build: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        build()


@pytest.mark.parametrize("field", ["first_dense_layers", "last_dense_layers", "warmup_tokens"])
def test_a_random_policy_has_no_negative_bounds(field: str) -> None:
    with pytest.raises(PolicyError, match=f"{field} must not be negative"):
        RandomPolicy(ratio=0.2, **{field: -1})


def test_gates_stand_between_the_dense_layers() -> None:
    plan = SkipPolicy(first_dense_layers=2, last_dense_layers=1).plan(8)
    assert plan.gated_layers == (3, 4, 5, 6)  # layer 2 is the first that may trigger
    assert plan.tested_layers == (2, 3, 4, 5)
    assert SkipPolicy(first_dense_layers=0, last_dense_layers=0).plan(3).gated_layers == (1, 2)


@pytest.mark.parametrize("kind", [SkipPolicy, partial(RandomPolicy, ratio=0.2)])
def test_the_names_of_earlier_releases_still_work(kind: Any) -> None:
    policy = kind(cold_start=2, cold_end=3)
    assert policy == kind(first_dense_layers=2, last_dense_layers=3)
    assert (policy.cold_start, policy.cold_end) == (2, 3)
    assert not {"cold_start", "cold_end"} & set(policy.to_dict())
    with pytest.raises(PolicyError, match="cold_end is the old name of last_dense_layers; give last_dense_layers only"):
        kind(cold_end=1, last_dense_layers=2)


@pytest.mark.parametrize("policy", [SkipPolicy(0.9, 2, 0, 3), RandomPolicy(0.25, 9, 0, 3)], ids=lambda one: one.kind)
def test_a_dictionary_of_an_earlier_release_is_read(policy: Policy) -> None:
    old = {name: value for name, value in policy.to_dict().items() if not name.endswith("dense_layers")}
    assert policy_from_dict({**old, "cold_start": 0, "cold_end": 3}) == policy


@pytest.mark.parametrize(
    "policy",
    [
        DensePolicy(),
        SkipPolicy(threshold=0.9, span=2, first_dense_layers=0, batch_rule="majority", layer_thresholds=(0.1, 0.2)),
        FixedPolicy(layers=(3, 1, 1)),
        RandomPolicy(ratio=0.25, seed=9),
        TimingPolicy(ratio=0.25),
    ],
    ids=lambda policy: policy.kind,
)
def test_a_policy_survives_its_dictionary(policy: Policy) -> None:
    assert policy_from_dict(policy.to_dict()) == policy
    assert policy.kind in policy.label or policy.kind in ("similarity", "fixed")


def test_a_long_set_of_layers_has_a_short_label() -> None:
    assert FixedPolicy((9, 4, 5, 6, 1, 8)).label == "fixed layers 1,4-6,8-9"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "unknown policy kind None; known are dense, similarity, neurons, fixed, random, timing"),
        ({"kind": "magic"}, "unknown policy kind 'magic'"),
        ({"kind": ["dense"]}, "unknown policy kind"),
        ({"kind": "similarity", "treshold": 0.5}, "treshold"),
        ({"kind": "fixed"}, "layers"),
        ({"kind": "fixed", "layers": 3}, "policy of kind 'fixed'"),
        ({"kind": "fixed", "layers": "ab"}, "layers"),
        ({"kind": "similarity", "threshold": "high"}, "policy of kind 'similarity'"),
        ({"kind": "similarity", "threshold": 2}, r"\[-1, 1\]"),
        ({"kind": "similarity", "span": 1.5}, "span"),
        ({"kind": "similarity", "first_dense_layers": 1.5}, "first_dense_layers"),
        ({"kind": "similarity", "cold_start": 1.5}, "first_dense_layers"),
        ({"kind": "similarity", "cold_start": 1, "first_dense_layers": 1}, "old name"),
        ({"kind": "similarity", "warmup_tokens": None}, "warmup_tokens"),
        ({"kind": "similarity", "batch_rule": []}, "batch_rule must be one of"),
        ({"kind": "random", "ratio": 0.2, "seed": 0.5}, "seed"),
    ],
)
def test_a_wrong_dictionary_is_a_policy_error(values: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policy_from_dict(values)


def decode(policy: Policy, layers: int = 8, tokens: int = 12) -> Generation:
    module = tiny_module(num_hidden_layers=layers)
    return tiny_engine(module=module, policy=policy).generate(PROMPT, max_new_tokens=tokens)[0]


def test_a_dense_policy_skips_nothing() -> None:
    answer = decode(DensePolicy())
    assert answer.skip_map.shape == (12, 8)
    assert not answer.skip_map.any()
    assert answer.skip_ratio == 0
    assert np.isnan(answer.similarity_map).all()


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_a_fixed_policy_skips_its_layers_past_the_warm_up(warmup: int) -> None:
    answer = decode(FixedPolicy(layers=(0, 5, 7), warmup_tokens=warmup))
    dense = max(1, warmup)  # the first token comes out of the prompt
    assert not answer.skip_map[:dense].any()
    assert all(np.flatnonzero(row).tolist() == [0, 5, 7] for row in answer.skip_map[dense:])
    assert answer.skip_ratio == 3 * (12 - dense) / (12 * 8)


def test_a_fixed_policy_without_layers_is_dense() -> None:
    assert not decode(FixedPolicy(layers=(), warmup_tokens=0)).skip_map.any()


@pytest.mark.parametrize(("ratio", "layers"), [(0.0, 8), (0.25, 8), (0.5, 8), (0.25, 6), (0.3, 7)])
def test_a_timing_policy_skips_exactly_its_share(ratio: float, layers: int) -> None:
    answer = decode(TimingPolicy(ratio), layers=layers)
    skipped = answer.skip_map[1:].sum(axis=1)
    assert (skipped == math.floor(ratio * layers + 0.5)).all()
    assert (~np.isnan(answer.similarity_map[1:, :-1]) == ~answer.skip_map[1:, :-1]).all()


def test_warm_up_and_dense_layers_count_in_the_ratio() -> None:
    answer = decode(SkipPolicy(threshold=-1.0, first_dense_layers=2, last_dense_layers=1, warmup_tokens=4))
    assert not answer.skip_map[:4].any()
    assert (answer.skip_map[4:] == [False, False, False, True, True, True, True, False]).all()
    assert answer.skip_ratio == (8 * 4) / (12 * 8)


def test_a_random_policy_reaches_its_ratio_outside_the_dense_layers() -> None:
    policy = RandomPolicy(ratio=0.4, seed=3, first_dense_layers=1, last_dense_layers=2, warmup_tokens=0)
    answer = decode(policy, layers=12, tokens=80)
    assert not answer.skip_map[:, [0, 10, 11]].any()
    assert answer.skip_map[1:].mean() == pytest.approx(0.4, abs=4 * math.sqrt(0.4 * 0.6 / (79 * 12)))
    assert (answer.skip_map.any(axis=0) == [False] + [True] * 9 + [False] * 2).all()


def test_a_random_policy_repeats_with_its_seed_only() -> None:
    first, again, other = (decode(RandomPolicy(ratio=0.4, seed=seed, warmup_tokens=0)) for seed in (3, 3, 4))
    assert (first.skip_map == again.skip_map).all()
    assert (first.skip_map != other.skip_map).any()
