"""Thresholds for neurons in policies: what is refused, and what a plan makes of them."""

import math
from dataclasses import replace

import numpy as np
import pytest

from skipkernels.errors import PolicyError
from skipkernels.program.state import gate_thresholds_of
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


@pytest.mark.parametrize("kind", [NeuronPolicy, SkipPolicy, lambda **fields: FixedPolicy(layers=(1,), **fields)])
@pytest.mark.parametrize("value", [0.0, -0.5, math.inf, math.nan, 1e-9, 70000.0])
def test_a_scale_is_a_number_above_0_that_float16_holds(kind, value: float) -> None:
    with pytest.raises(PolicyError, match=rf"up_scales\[1\]\[0\] must be above 0 in float16, .*, got {value}"):
        kind(gate_thresholds=(0.5, 0.5), up_scales=((1.0, 2.0), (value, 2.0)))


@pytest.mark.parametrize("row", [("1.0", 2.0), (None, 1.0), (), 3.0, ((1.0, 2.0),), (True, False)])
def test_scales_are_lists_of_numbers(row) -> None:
    with pytest.raises(PolicyError, match=r"up_scales\[1\] must be numbers, one per neuron, got"):
        NeuronPolicy(gate_thresholds=(0.5, 0.5), up_scales=((1.0, 2.0), row))


def test_scales_of_other_layers_or_of_no_gate_threshold_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"up_scales\[1\] has 1 entries, up_scales\[0\] 2"):
        NeuronPolicy(gate_thresholds=(0.5, 0.5), up_scales=((1.0, 2.0), (1.0,)))
    with pytest.raises(PolicyError, match="up_scales has 1 layers, gate_thresholds 2"):
        NeuronPolicy(gate_thresholds=(0.5, 0.5), up_scales=((1.0, 2.0),))
    with pytest.raises(PolicyError, match="up_scales has 1 layers, gate_thresholds 0; scales go with gate thresholds"):
        NeuronPolicy(product_thresholds=(0.5,), up_scales=((1.0, 2.0),))


def test_scales_are_what_float16_makes_of_them() -> None:
    policy = NeuronPolicy(gate_thresholds=(0.5,), up_scales=((0.1, 3, 1 / 3),))
    assert policy.up_scales == ((0.0999755859375, 3.0, 0.333251953125),)
    assert replace(policy, warmup_tokens=3).up_scales == policy.up_scales
    assert "0.0999" not in repr(policy), "46,080 numbers of a small model do not belong in a message"


def test_a_neurons_threshold_is_its_layers_divided_by_its_scale() -> None:
    plan = NeuronPolicy(gate_thresholds=(0.7, 0.0), up_scales=((0.1, 3.0), (6e-8, 65504.0))).plan(2)
    expected = np.float32(0.7) / np.array([0.0999755859375, 3.0], dtype=np.float32)
    assert gate_thresholds_of(plan.neurons).tolist() == [expected.tolist(), [0.0, 0.0]]
    alike = NeuronPolicy(gate_thresholds=(0.7, 0.25)).plan(2)
    assert gate_thresholds_of(alike.neurons).tolist() == [[float(np.float32(0.7))], [0.25]]


def test_plans_of_other_scales_are_other_plans() -> None:
    """The cache of a prompt's blocks tells policies apart by the text of their plans."""
    scales = [[1.0] * 3000, [1.0] * 3000]
    one, same = (NeuronPolicy(gate_thresholds=(0.5, 0.5), up_scales=scales).plan(2) for _ in range(2))
    scales[1][1500] = 2.0
    other = NeuronPolicy(gate_thresholds=(0.5, 0.5), up_scales=scales).plan(2)
    assert one == same
    assert one != other
    assert repr(one) == repr(same)
    assert repr(one) != repr(other)
    assert len(repr(one)) < 600
