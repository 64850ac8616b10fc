"""How many prompt rows a step may have: all of them alone, a few beside running streams."""

import pytest

from skipkernels.decoding.row_budget import SLOWDOWN, RowBudget


def taught(step_s: float, row_s: float, capacity: int = 240) -> RowBudget:
    """A budget that has seen steps of a machine with these times."""
    budget = RowBudget(capacity)
    for _ in range(30):
        budget.measured(0, 1, step_s)
        budget.measured(64, 0, 64 * row_s)
        budget.measured(16, 1, step_s + 16 * row_s)
    return budget


def test_a_prompt_alone_gets_every_row() -> None:
    assert RowBudget(240).rows(decoding=False) == 240
    assert taught(0.01, 0.001).rows(decoding=False) == 240


@pytest.mark.parametrize(("step_s", "row_s"), [(0.01, 0.001), (0.06, 0.004), (0.0002, 0.000008)])
def test_a_step_beside_streams_takes_a_few_times_as_long(step_s: float, row_s: float) -> None:
    rows = taught(step_s, row_s).rows(decoding=True)
    assert step_s + rows * row_s == pytest.approx(SLOWDOWN * step_s, rel=0.1)


def test_a_slow_machine_still_gets_on_with_the_prompt() -> None:
    assert taught(0.001, 1.0).rows(decoding=True) == 8
    assert taught(0.001, 1.0, capacity=2).rows(decoding=True) == 2


def test_before_anything_is_known_it_is_careful() -> None:
    assert 1 <= RowBudget(240).rows(decoding=True) <= 32
    assert RowBudget(3).rows(decoding=True) == 3


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    budget = taught(0.01, 0.0001)
    before = budget.rows(decoding=True)
    for _ in range(20):
        budget.measured(32, 1, 0.01 + 32 * 0.001)
    assert budget.rows(decoding=True) < before / 3


def test_rows_late_in_a_long_prompt_cost_more() -> None:
    budget = taught(0.01, 0.0005)
    for start in range(0, 3000, 8):
        cost = 8 * 0.0005 * (1 + start / 500)
        budget.measured(8, 1, 0.01 + cost, start)
    assert budget.growth == pytest.approx(1 / 500, rel=0.1)
    assert budget.rows(decoding=True) == pytest.approx((SLOWDOWN - 1) * 0.01 / 0.0005, rel=0.1)


def test_costs_by_chance_make_no_line_that_falls() -> None:
    budget = RowBudget(240)
    budget.measured(0, 1, 0.01)
    for position, seconds in [(0, 0.05), (100, 0.02), (200, 0.03), (3000, 0.02)] * 3:
        budget.measured(8, 1, seconds, position)
    assert budget.growth == 0.0
    assert 1 <= budget.rows(decoding=True) <= 240
    steep = RowBudget(240)
    for position in (1000, 1100, 1200):
        steep.measured(8, 0, 0.001 * (position - 990), position)
    assert 0.0 < steep.growth < 1.0
