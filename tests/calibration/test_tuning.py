"""Tuning: the wanted saving by decoding, and costs that can be compared."""

import numpy as np
import pytest

from skipkernels.calibration.neuron_profile import profile_neurons
from skipkernels.calibration.passages import cut_passages
from skipkernels.calibration.scoring import Comparison
from skipkernels.calibration.simulation import tuned
from skipkernels.calibration.tuning import CLOSE, KL_EXPONENT, Decoder, Trial
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, Policy, SkipPolicy
from tests.models import random_prompt, tiny_engine, tiny_module

LAYERS, NEW_TOKENS = 10, 40
ENGINE = tiny_engine(module=tiny_module(num_hidden_layers=LAYERS), max_batch_size=6, neuron_rows=True)
PASSAGES, _ = cut_passages(ENGINE, [random_prompt(2000)], 12, 8, NEW_TOKENS)


def decoder() -> Decoder:
    return Decoder(ENGINE, PASSAGES, lambda tokens: None)


def trial(ratio: float, kl: float) -> Trial:
    return Trial("fixed", DensePolicy(), Comparison(ratio, ratio, 1.0, kl, 1.0, 1.0, 100, LAYERS), (kl, kl), 0.25)


def test_neurons_and_blocks_reach_the_saving() -> None:
    profile = profile_neurons(ENGINE, PASSAGES)
    decoding = decoder()
    neurons = decoding.tune("neurons", lambda saving: profile.policy(saving, 1.0, 5), 0.3, 5)
    assert neurons.missed <= CLOSE
    shape = SkipPolicy(span=2, first_dense_layers=2, warmup_tokens=5)
    blocks = decoding.tune("similarity", lambda saving: tuned(profile.similarities, shape, saving), 0.3, 5)
    assert blocks.missed <= 0.01
    for found in (neurons, blocks):
        again = decoding.try_out(found.kind, found.policy, 0.3, 5)
        assert again == found


def test_the_saving_counts_the_warm_up() -> None:
    half = decoder().try_out("fixed", FixedPolicy((0, 1, 2, 3, 4), 8), 0.4, 8)
    assert half.comparison.skip_ratio == pytest.approx(0.5 * (1 - 8 / NEW_TOKENS))
    assert decoder().share_past_warmup(8) == pytest.approx(1 - 8 / NEW_TOKENS)
    assert decoder().share_past_warmup(0) == pytest.approx(1 - 1 / NEW_TOKENS)


def test_a_search_that_overshoots_is_bisected_and_ends() -> None:
    """Nothing lies between none and half of the blocks."""
    asked: list[float] = []

    def policy_at(saving: float) -> Policy:
        asked.append(saving)
        return FixedPolicy(tuple(range(5)) if saving > 0.3 else (), 1)

    found = decoder().tune("fixed", policy_at, 0.35, 1)
    assert found.policy == FixedPolicy((0, 1, 2, 3, 4), 1)
    assert len(asked) <= 6


def test_a_policy_that_is_impossible_is_an_error_only_if_none_is_possible() -> None:
    def never(saving: float) -> Policy:
        raise PolicyError("no")

    with pytest.raises(PolicyError, match="no"):
        decoder().tune("fixed", never, 0.3, 1)


def test_costs_are_compared_at_the_wanted_saving() -> None:
    assert trial(0.25, 0.1).costs.tolist() == [0.1, 0.1]
    assert trial(0.2, 0.1).costs.mean() == pytest.approx(0.1 * (0.25 / 0.2) ** KL_EXPONENT)
    assert trial(0.0, 0.0).rank[0]
    assert not np.isfinite(trial(0.0, 0.1).costs).any()


def test_what_reaches_the_saving_comes_before_what_costs_less() -> None:
    ranked = sorted([trial(0.15, 0.001), trial(0.251, 0.2), trial(0.249, 0.1)], key=lambda t: t.rank)
    assert [t.comparison.skip_ratio for t in ranked] == [0.249, 0.251, 0.15]
