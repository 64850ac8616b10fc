"""The cheapest split against all splits."""

import random
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.modality.errors import AccuracyUnreachable, JobError
from skipkernels.modality.optimiser import EPSILON, TABLE_SIZE, SplitTable, cheapest_split, serial_ms
from skipkernels.modality.profile import Profile
from tests.modality.profiles import entry, random_profiles


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def shortest(times: Sequence[float], requests: int) -> float:
    """The least time of any sequence of batches, by trying them all."""
    if requests == 0:
        return 0.0
    return min(times[size] + shortest(times, requests - size) for size in range(1, min(requests, len(times) - 1) + 1))


@given(random_profiles(most=4), st.integers(1, 6), st.floats(0.0, 1.0))
def test_no_split_that_keeps_the_promise_is_cheaper(profile: Profile, requests: int, share: float) -> None:
    entries = profile.strategies
    promised = [one.promised_accuracy for one in entries]
    target = share * max(promised)
    times = [[0.0, *(one.median_ms(size) for size in range(1, 5))] for one in entries]
    best = min(
        sum(shortest(row, count) for row, count in zip(times, counts, strict=True))
        for counts in compositions(requests, len(entries))
        if sum(one * count for one, count in zip(promised, counts, strict=True)) >= target * requests - EPSILON
    )
    split, ms = cheapest_split(entries, requests, target)
    assert ms == pytest.approx(best)
    assert sum(split.values()) == requests
    assert sum(promised[strategy] * count for strategy, count in split.items()) >= target * requests - 2 * EPSILON
    assert sum(shortest(times[strategy], count) for strategy, count in split.items()) == pytest.approx(ms)


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=4), st.integers(0, 7))
def test_batches_in_a_row_take_the_least_time(times: list[float], requests: int) -> None:
    rows = [0.0, *times]
    assert serial_ms(rows, requests)[requests] == pytest.approx(shortest(rows, requests))


@pytest.mark.parametrize("seed", range(4))
def test_large_jobs_by_integer_program_agree_with_the_table(seed: int) -> None:
    pytest.importorskip("scipy")
    draw = random.Random(seed)
    promised = sorted(draw.uniform(0.5, 0.9) for _ in range(4))
    entries = [entry(f"audio@{row / 10}", one, 2.0 * row + draw.random()) for row, one in enumerate(promised)]
    requests, target = TABLE_SIZE + 5, 0.95 * entries[-1].promised_accuracy
    times = [[0.0, *(one.median_ms(size) for size in range(1, 9))] for one in entries]
    table = SplitTable([one.promised_accuracy for one in entries], times, requests)
    _, ms = cheapest_split(entries, requests, target)
    assert ms == pytest.approx(table.cheapest(requests, target * requests)[1])


@given(random_profiles())
def test_more_than_the_best_is_refused_with_the_best(profile: Profile) -> None:
    best = max(one.promised_accuracy for one in profile.strategies)
    for requests in (1, TABLE_SIZE + 1):
        with pytest.raises(AccuracyUnreachable, match="at most ") as caught:
            cheapest_split(profile.strategies, requests, best + 1e-6)
        assert caught.value.reachable == best
        shown = float(str(caught.value).partition("at most ")[2].partition(" can")[0])
        assert shown == pytest.approx(best, abs=1e-4)
        cheapest_split(profile.strategies, requests, shown)  # not refused


def test_an_empty_job_is_refused() -> None:
    with pytest.raises(JobError, match="at least one request, got 0"):
        cheapest_split([], 0, 0.5)
