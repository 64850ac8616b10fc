"""Who is given up when not all can be in time."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from skipkernels.modality.demand import without_hope

JOBS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), min_size=1, max_size=8).map(sorted)


def all_in_time(jobs: list[tuple[int, int]]) -> bool:
    used = 0
    for budget, cost in jobs:
        used += cost
        if used > budget:
            return False
    return True


@given(JOBS)
def test_no_fewer_could_be_given_up(jobs: list[tuple[int, int]]) -> None:
    given_up = without_hope([float(budget) for budget, _ in jobs], [float(cost) for _, cost in jobs])
    assert all_in_time([one for position, one in enumerate(jobs) if position not in given_up])
    for fewer in range(len(given_up)):
        for dropped in combinations(range(len(jobs)), fewer):
            assert not all_in_time([one for position, one in enumerate(jobs) if position not in dropped])
