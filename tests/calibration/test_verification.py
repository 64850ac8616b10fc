"""Verification: the best on held-out text comes first, and a verdict only where chance is ruled out."""

import pytest

from skipkernels.calibration.passages import Passage
from skipkernels.calibration.scoring import Comparison
from skipkernels.calibration.tuning import Decoder, Trial
from skipkernels.calibration.verification import Margin, margin, verify
from skipkernels.skipping.policy import FixedPolicy
from tests.models import random_prompt, tiny_engine, tiny_module

PASSAGES = [Passage(tuple(random_prompt(32, seed)), 8) for seed in range(6)]


def trial(passage_kl: tuple[float, ...], layers: tuple[int, ...] = (1,)) -> Trial:
    comparison = Comparison(0.25, 0.25, 1.0, passage_kl[0], 1.0, 1.0, 100, 4)
    return Trial("fixed", FixedPolicy(layers, 1), comparison, passage_kl, 0.25)


def test_the_order_is_that_of_the_held_out_text() -> None:
    engine = tiny_engine(module=tiny_module(num_hidden_layers=4), max_batch_size=6)
    claimed = [trial((0.0,), (layer,)) for layer in range(4)]
    verified = verify(Decoder(engine, PASSAGES, lambda tokens: None), claimed, 1)
    costs = [float(found.costs.mean()) for found in verified]
    assert costs == sorted(costs)
    assert len(set(costs)) == 4
    assert {found.policy for found in verified} == {found.policy for found in claimed}
    assert all(len(found.passage_kl) == 6 for found in verified)


def test_a_margin_is_the_paired_difference() -> None:
    best, other = trial((0.1, 0.2, 0.3, 0.1)), trial((0.2, 0.3, 0.4, 0.2))
    found = margin(best, other)
    assert (found.kl, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.verdict == "beats"
    assert (found.passages, found.tokens) == (4, 100)
    assert margin(best, best).verdict == "is level with"
    assert margin(other, best).verdict == "loses to"


def test_a_single_passage_beats_nothing() -> None:
    """Its interval has no width, however far apart the two are."""
    found = margin(trial((0.1,)), trial((0.9,)))
    assert found.low == found.high == pytest.approx(0.8)
    assert found.verdict == "cannot be told from"
    assert margin(trial((0.1,) * 4), trial((0.9,) * 4)).verdict == "beats"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.01, 0.03, "beats"), (-0.01, 0.03, "is level with"), (-0.03, -0.01, "loses to"), (0.0, 0.0, "is level with")],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert Margin("fixed", 0.25, 0.01, low, high, 8, 1024).verdict == verdict
