"""Thresholds for neurons in policies: what is refused, and what a plan makes of them."""

import math

import pytest

from skipkernels.errors import PolicyError
from skipkernels.skipping.neuron_rule import NeuronPlan
from skipkernels.skipping.policy import RAMP_TOKENS, FixedPolicy, NeuronPolicy, SkipPolicy


@pytest.mark.parametrize("kind", [NeuronPolicy, SkipPolicy, lambda **fields: FixedPolicy(layers=(1,), **fields)])
@pytest.mark.parametrize("name", ["gate_thresholds", "product_thresholds"])
@pytest.mark.parametrize("value", [-0.5, -math.inf, math.inf, math.nan, "0.5", None, True])
def test_a_threshold_is_a_finite_number_of_at_least_0(kind, name: str, value) -> None:
    with pytest.raises(PolicyError, match=rf"{name}\[2\] must be a finite number of at least 0, got"):
        kind(**{name: (0.0, 1.0, value)})


@pytest.mark.parametrize(
    "policy", [NeuronPolicy(gate_thresholds=(0.1,) * 5), SkipPolicy(product_thresholds=(0.1,) * 5)]
)
def test_thresholds_of_another_number_of_layers_are_refused(policy) -> None:
    with pytest.raises(PolicyError, match="thresholds has 5 entries, the model 6 layers"):
        policy.plan(6)
    with pytest.raises(PolicyError, match="gate_thresholds has 2 entries, product_thresholds 3"):
        NeuronPolicy(gate_thresholds=(0.1,) * 2, product_thresholds=(0.1,) * 3)


def test_a_policy_of_neurons_has_thresholds() -> None:
    with pytest.raises(PolicyError, match="needs gate_thresholds or product_thresholds"):
        NeuronPolicy()
    with pytest.raises(PolicyError, match="warmup_tokens must not be negative"):
        NeuronPolicy(gate_thresholds=(0.1,), warmup_tokens=-1)


def test_a_plan_has_both_thresholds_of_every_layer() -> None:
    plan = NeuronPolicy(product_thresholds=(0.1, 0.2, 0.3), warmup_tokens=4).plan(3)
    assert plan.neurons == NeuronPlan((0.0, 0.0, 0.0), (0.1, 0.2, 0.3))
    assert (plan.gated_layers, plan.warmup_tokens, plan.target_ratio) == ((), 4, 0.0)
    both = SkipPolicy(threshold=0.9, gate_thresholds=(0.5,) * 4).plan(4)
    assert both.gated_layers == (2,)
    assert both.neurons == NeuronPlan((0.5,) * 4, (0.0,) * 4)
    fixed = FixedPolicy(layers=(2,), gate_thresholds=(0.5,) * 4).plan(4)
    assert fixed is not None
    assert fixed.gated_layers == (2,)
    assert fixed.neurons == both.neurons
    assert SkipPolicy(threshold=0.9).plan(4).neurons is None


def test_a_held_ratio_of_neurons_is_held_by_their_thresholds() -> None:
    policy = SkipPolicy(gate_thresholds=(0.5,) * 6, target_ratio=0.3, warmup_tokens=0)
    plan = policy.plan(6)
    assert plan.target_ratio == 0.0  # the gates hold nothing
    assert plan.neurons == NeuronPlan((0.5,) * 6, (0.0,) * 6, 0.3, RAMP_TOKENS)


def test_a_ratio_no_threshold_can_reach_is_refused() -> None:
    gates = (0.5, 0.5, 0.0)  # two thirds of two layers, and one third of the last: 5 of 9 thirds
    policy = NeuronPolicy(gate_thresholds=gates, product_thresholds=(0.0, 0.1, 0.1), target_ratio=0.55)
    assert policy.plan(3).neurons is not None
    with pytest.raises(PolicyError, match=r"target_ratio 0.56 cannot be held: .* less than 0.556 of the FFN bytes"):
        NeuronPolicy(gate_thresholds=gates, product_thresholds=(0.0, 0.1, 0.1), target_ratio=0.56).plan(3)
    with pytest.raises(PolicyError, match="must lie between 0 and 1"):
        NeuronPolicy(gate_thresholds=gates, target_ratio=0.0)


def test_an_old_or_new_label_names_the_grain() -> None:
    assert NeuronPolicy(gate_thresholds=(0.1,)).label == "neurons below gate thresholds per layer"
    assert "neurons" in SkipPolicy(gate_thresholds=(0.1,)).label
    assert "neurons" not in SkipPolicy().label
