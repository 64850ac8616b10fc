"""A meter's shares only grow, and stages end where they were said to."""

from hypothesis import given
from hypothesis import strategies as st

from skipkernels.support.progress import Meter


@given(st.lists(st.tuples(st.integers(0, 50), st.lists(st.integers(0, 20)))))
def test_shares_only_grow_and_stay_within_their_stage(stages: list[tuple[int, list[int]]]) -> None:
    seen: list[tuple[str, float]] = []
    meter = Meter(lambda stage, share: seen.append((stage, share)))
    for number, (planned, counts) in enumerate(stages):
        meter.stage(str(number), (number + 1) / len(stages), planned)
        for units in counts:
            meter.count(units)
        if sum(counts) >= max(1, planned):
            assert seen[-1] == (str(number), (number + 1) / len(stages))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    for stage, share in seen:
        assert int(stage) <= share * len(stages) * (1 + 1e-9) <= (int(stage) + 1) * (1 + 1e-9)


def test_a_stage_that_ends_early_leaves_its_rest() -> None:
    seen: list[float] = []
    meter = Meter(lambda stage, share: seen.append(share))
    meter.stage("one", 0.5, 10)
    meter.count(5)
    meter.stage("two", 1.0, 4)
    meter.count(1)
    assert seen == [0.0, 0.25, 0.5, 0.625]
