"""Matching: few measurements, and none beyond the ends."""

import math
from collections.abc import Callable

import pytest

from skipkernels.methods.matching import CLOSE_ENOUGH, match
from skipkernels.methods.method import ignore


def measured(ratio_at: Callable[[float], float], wanted: float) -> tuple[float, list[float]]:
    """The ratio that was found between -9 and 9, and the settings that were tried."""
    tried: list[float] = []

    def measure(setting: float) -> float:
        tried.append(setting)
        return ratio_at(setting)

    setting, ratio = match(measure, wanted, -9.0, 9.0, ignore)
    assert ratio == ratio_at(setting)
    return ratio, tried


@pytest.mark.parametrize("place", [0.0, 0.05, -0.4, 1.3])
def test_a_policy_that_is_nearly_right_takes_few_decodes(place: float) -> None:
    """Bisection from end to end takes up to ten."""
    ratio, tried = measured(lambda setting: 0.6 / (1 + math.exp(setting - place)), 0.3)
    assert abs(ratio - 0.3) <= CLOSE_ENOUGH
    assert len(tried) <= 6


@pytest.mark.parametrize("place", [-8.3, -5.0, -2.0, 5.0, 8.3])
def test_a_steep_ratio_is_found_wherever_it_is(place: float) -> None:
    ratio, tried = measured(lambda setting: 0.6 / (1 + math.exp(4 * (setting - place))), 0.24)
    assert abs(ratio - 0.24) <= CLOSE_ENOUGH
    assert all(-9 <= setting <= 9 for setting in tried)


def test_of_steps_the_nearest_is_taken() -> None:
    ratio, _ = measured(lambda setting: round(4 / (1 + math.exp(setting - 1))) / 10, 0.24)
    assert ratio == 0.2


@pytest.mark.parametrize(("wanted", "end"), [(0.5, -9.0), (0.001, 9.0)])
def test_what_cannot_be_reached_ends_at_the_end(wanted: float, end: float) -> None:
    ratio, tried = measured(lambda setting: 0.1 - setting / 100, wanted)
    assert ratio == pytest.approx(0.1 - end / 100)
    assert tried[-1] == end
    assert len(tried) == 4
