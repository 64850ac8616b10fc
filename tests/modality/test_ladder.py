"""The hull, and how far a job may step down it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.modality.ladder import Hull, Ladder
from skipkernels.modality.optimiser import EPSILON

POINTS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=8)


def hull_of(points: list[tuple[int, int]]) -> tuple[Hull, list[float], list[float]]:
    promised, prices = [accuracy / 100 for accuracy, _ in points], [float(price) for _, price in points]
    return Hull(range(len(points)), promised, prices), promised, prices


@given(POINTS)
def test_nothing_lies_above_the_hull(points: list[tuple[int, int]]) -> None:
    hull, promised, prices = hull_of(points)
    assert promised[hull.rungs[0]] == max(promised)
    assert prices[hull.rungs[-1]] == min(prices)
    for strategy in range(len(points)):
        for upper, lower in pairwise(hull.rungs):
            if prices[lower] <= prices[strategy] <= prices[upper]:
                share = (prices[strategy] - prices[lower]) / (prices[upper] - prices[lower])
                on_hull = promised[lower] + share * (promised[upper] - promised[lower])
                assert promised[strategy] <= on_hull + 1e-12


@given(POINTS)
def test_each_step_is_a_worse_bargain_than_the_one_before(points: list[tuple[int, int]]) -> None:
    hull, promised, prices = hull_of(points)
    assert all(earlier < later for earlier, later in pairwise(hull.bargain))
    for rung, (upper, lower) in enumerate(pairwise(hull.rungs)):
        assert hull.saved_ms[rung] == prices[upper] - prices[lower] > 0
        assert hull.lost[rung] == promised[upper] - promised[lower] >= 0


@given(POINTS, st.integers(1, 9), st.floats(0.0, 1.0), st.data())
def test_a_job_steps_down_as_far_as_its_promise_allows(
    points: list[tuple[int, int]], requests: int, share: float, data: st.DataObject
) -> None:
    hull, promised, _ = hull_of(points)
    needed_sum = share * hull.top * requests

    def promised_sum() -> float:
        return sum(promised[strategy] * count for strategy, count in ladder.split().items())

    ladder = Ladder(hull, requests, needed_sum)
    while ladder.available():
        ladder.descend(data.draw(st.integers(1, ladder.available())))
        assert sum(ladder.split().values()) == requests
        assert promised_sum() >= needed_sum - 2 * EPSILON
    if ladder.rung < len(hull.lost):  # one more step would break the promise
        assert promised_sum() - hull.lost[ladder.rung] < needed_sum


def test_whoever_has_no_room_stays_at_the_top() -> None:
    hull, _, _ = hull_of([(90, 10), (80, 2)])
    assert Ladder(hull, 3, 2.7).available() == 0
    assert Ladder(hull, 3, 2.65).available() == 0
    assert Ladder(hull, 3, 2.6).available() == 1
    assert Ladder(hull, 3, 2.4).available() == 3
    assert Ladder(hull, 3, 2.4).split() == pytest.approx({0: 3})
