"""Shares of FFN bytes and the policies that hold them."""

from pathlib import Path

import pytest

from skipkernels.chat.skip_levels import policies_of_files, policies_of_levels, usual_levels
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, NeuronPolicy, SkipPolicy
from skipkernels.skipping.policy_file import save_policy

BASE = SkipPolicy(threshold=0.8, span=2, first_dense_layers=0, warmup_tokens=3)


def test_every_level_has_the_base_with_its_ratio() -> None:
    policies = policies_of_levels(BASE, [0.2, 0.0])
    assert list(policies) == [0.0, 0.2]
    assert policies[0.0] == DensePolicy()
    assert policies[0.2] == SkipPolicy(threshold=0.8, span=2, first_dense_layers=0, warmup_tokens=3, target_ratio=0.2)


@pytest.mark.parametrize(
    ("levels", "message"),
    [([], "there must be one"), ([0.1, 0.1], "must differ"), ([1.5], "target_ratio"), ([-0.1], "target_ratio")],
)
def test_impossible_levels_are_refused(levels: list[float], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        policies_of_levels(BASE, levels)


def test_a_policy_that_holds_no_ratio_has_no_levels() -> None:
    assert policies_of_levels(FixedPolicy((1,)), [0.0]) == {0.0: DensePolicy()}
    with pytest.raises(PolicyError, match="kind 'fixed' holds none"):
        policies_of_levels(FixedPolicy((1,)), [0.0, 0.1])


def test_the_usual_levels_are_those_that_can_be_held() -> None:
    assert usual_levels(SkipPolicy(first_dense_layers=0, last_dense_layers=0), 16) == [0.0, 0.1, 0.2, 0.3]
    assert usual_levels(SkipPolicy(first_dense_layers=4, last_dense_layers=11, span=5), 24) == [0.0, 0.1, 0.2]
    assert usual_levels(FixedPolicy((1,)), 16) == [0.0]
    for level in usual_levels(BASE, 8):
        policies_of_levels(BASE, [level])[level].plan(8)


def test_neurons_hold_what_their_thresholds_can() -> None:
    assert usual_levels(NeuronPolicy(gate_thresholds=(1.0,) * 4), 4) == [0.0, 0.1, 0.2, 0.3]
    assert usual_levels(NeuronPolicy(product_thresholds=(1.0, 1.0, 1.0, 0.0)), 4) == [0.0, 0.1, 0.2]
    neurons = NeuronPolicy(product_thresholds=(1.0,) * 4)
    assert policies_of_levels(neurons, [0.1])[0.1] == NeuronPolicy(product_thresholds=(1.0,) * 4, target_ratio=0.1)


def test_a_file_says_its_share(tmp_path: Path) -> None:
    file, other = tmp_path / "a.json", tmp_path / "b.json"
    save_policy(file, FixedPolicy((1,)), fingerprint="", measured={})
    with pytest.raises(PolicyError, match=r"a.json: says no share"):
        policies_of_files([file])
    for name in (file, other):
        save_policy(name, NeuronPolicy(product_thresholds=(1.0,), target_ratio=0.2), fingerprint="", measured={})
    assert list(policies_of_files([file])) == [0.0, 0.2]
    with pytest.raises(PolicyError, match=r"a.json and .*b.json both leave out a share of 0.2"):
        policies_of_files([file, other])
