"""Queues laid out in batches, counted by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.modality.demand import Demand
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.plan import BatchLimits, Plan, lay_out
from skipkernels.modality.profile import Profile
from skipkernels.modality.strategy_options import StrategyOptions
from tests.modality.profiles import BOTH, random_profiles, two_speeds

FULL, AUDIO = 0, 1  # 1 + 10 n ms and 1 + 2 n ms


def demand(requests: int, deadline_ms: float, *, work: float = 1.0, profile: Profile | None = None) -> Demand:
    profile = profile or two_speeds()
    return Demand(requests, 0.0, work, deadline_ms, StrategyOptions(profile, BOTH, LatencyModel(profile)))


def plan_of(
    demands: list[Demand],
    splits: list[dict[int, int]],
    *,
    free_ms: tuple[float, ...] = (0.0,),
    limit: int = 8,
    longest_ms: float = math.inf,
    spread: float = 1.0,
) -> Plan:
    latency = LatencyModel(two_speeds(spread=spread))
    limits = BatchLimits([limit] * 2, longest_ms)
    return lay_out(demands, splits, range(len(demands)), free_ms, latency, limits)


def test_a_job_runs_strategy_by_strategy() -> None:
    plan = plan_of([demand(3, math.inf)], [{FULL: 1, AUDIO: 2}])
    assert (plan.strategy, plan.members, plan.expected_ms) == (FULL, [(0, 1)], 11.0)
    assert plan.end_ms == [11.0 + 5.0]


def test_jobs_share_batches() -> None:
    plan = plan_of([demand(1, 100.0), demand(2, 200.0), demand(9, 300.0)], [{AUDIO: 1}, {AUDIO: 2}, {AUDIO: 9}])
    assert plan.members == [(0, 1), (1, 2), (2, 5)]
    assert plan.end_ms == [17.0, 17.0, 17.0 + 9.0]


def test_no_one_is_made_late_to_fill_a_batch() -> None:
    splits = [{AUDIO: 1}, {AUDIO: 7}]
    assert plan_of([demand(1, 7.0), demand(7, 99.0)], splits).members == [(0, 1), (1, 2)]
    assert plan_of([demand(1, 3.0), demand(7, 99.0)], splits).members == [(0, 1)]
    # late in any case: nothing to lose
    assert plan_of([demand(1, 2.0), demand(7, 99.0)], splits).members == [(0, 1), (1, 7)]


def test_the_rest_of_a_job_counts_before_filling() -> None:
    splits = [{AUDIO: 1, FULL: 1}, {AUDIO: 7}]
    assert plan_of([demand(2, 18.0), demand(7, 99.0)], splits).members == [(0, 1), (1, 2)]


def test_batches_keep_to_their_limits() -> None:
    assert plan_of([demand(9, math.inf)], [{AUDIO: 9}], limit=4).end_ms == [9.0 + 9.0 + 3.0]
    assert plan_of([demand(9, math.inf)], [{AUDIO: 9}], longest_ms=7.9).members == [(0, 3)]
    assert plan_of([demand(9, math.inf)], [{AUDIO: 9}], longest_ms=1.0).members == [(0, 1)]


def test_large_requests_take_longer_and_join_no_smaller_ones() -> None:
    small, large = demand(1, 50.0), demand(1, 99.0, work=3.0)
    splits = [{AUDIO: 1}, {AUDIO: 1}]
    plan = plan_of([small, large], splits)
    assert plan.members == [(0, 1)]
    assert plan.end_ms == [3.0, 3.0 + 9.0]
    assert plan_of([demand(1, 50.0, work=3.0), demand(1, 99.0)], splits).members == [(0, 1), (1, 1)]
    assert plan_of([large, demand(1, 99.0)], splits).expected_ms == 15.0
    assert plan_of([demand(9, math.inf, work=2.0)], [{AUDIO: 9}], longest_ms=10.0).members == [(0, 2)]


def test_the_worker_that_is_free_first_runs_next() -> None:
    demands = [demand(1, 99.0), demand(1, 99.0), demand(1, 99.0)]
    plan = plan_of(demands, [{FULL: 1}, {FULL: 1}, {AUDIO: 1}], free_ms=(0.0, 5.0), limit=1)
    assert plan.end_ms == [11.0, 16.0, 14.0]


def test_spreads_of_batches_add_up_as_squares() -> None:
    demands = [demand(1, math.inf), demand(1, math.inf)]
    plan = plan_of(demands, [{FULL: 1}, {AUDIO: 1}], spread=2.0)
    assert plan.end_ms == pytest.approx([11.0 + 11.0, 14.0 + math.hypot(11.0, 3.0)])


def test_only_what_is_ordered_is_planned() -> None:
    latency = LatencyModel(two_speeds())
    demands = [demand(1, 99.0), demand(1, 99.0)]
    splits = [{FULL: 1}, {AUDIO: 1}]
    plan = lay_out(demands, splits, [1, 0], [0.0], latency, BatchLimits([8, 8]))
    assert (plan.strategy, plan.members, plan.end_ms) == (AUDIO, [(1, 1)], [14.0, 3.0])
    assert splits == [{FULL: 1}, {AUDIO: 1}]


@given(random_profiles(), st.data())
def test_every_batch_is_planned_once_and_in_order(profile: Profile, data: st.DataObject) -> None:
    """Whatever the queue: starting the first batch and planning the rest leads through all requests, and no batch
    overtakes the head of the queue."""
    latency = LatencyModel(profile)
    limits = BatchLimits(latency.batch_limits, data.draw(st.floats(1.0, 50.0)))
    demands, splits = [], []
    for deadline_ms in sorted(data.draw(st.lists(st.floats(0.0, 200.0), min_size=1, max_size=6))):
        split = data.draw(
            st.dictionaries(st.integers(0, len(profile.strategies) - 1), st.integers(1, 5), min_size=1, max_size=3)
        )
        demands.append(demand(sum(split.values()), deadline_ms, profile=profile))
        splits.append(dict(split))
    now_ms = 0.0
    planned = lay_out(demands, splits, range(len(demands)), [now_ms], latency, limits)
    ended = dict.fromkeys(range(len(demands)), 0.0)
    while any(splits):
        order = [position for position, split in enumerate(splits) if split]
        plan = lay_out(demands, splits, order, [now_ms], latency, limits)
        assert plan.members[0][0] == order[0]
        now_ms += plan.expected_ms
        for position, count in plan.members:
            splits[position][plan.strategy] -= count
            assert splits[position][plan.strategy] >= 0
            splits[position] = {strategy: left for strategy, left in splits[position].items() if left}
            ended[position] = now_ms
    assert planned.end_ms == pytest.approx([ended[position] for position in range(len(demands))])
