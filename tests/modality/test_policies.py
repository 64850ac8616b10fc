"""The policies' choices: within every job's promise and every deadline's budget, and how good they are."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.modality.demand import Demand
from skipkernels.modality.errors import StrategyError
from skipkernels.modality.latency import LatencyModel
from skipkernels.modality.optimiser import EPSILON, Split
from skipkernels.modality.policies import POLICIES, get_selection_policy
from skipkernels.modality.profile import Profile
from skipkernels.modality.strategy_options import StrategyOptions, cost_ms
from tests.modality.profiles import BOTH, entry, profile_of, random_profiles, two_speeds

FULL, AUDIO = 0, 1


class Queue:
    """Demands with budgets that the cheapest splits just fit, times a factor above 1."""

    def __init__(self, profile: Profile, jobs: Sequence[tuple[int, float, float, float]]) -> None:
        latency = LatencyModel(profile)
        options = StrategyOptions(profile, BOTH, latency)
        self.promised = options.promised
        self.strategies = options.strategies
        self.prices = latency.request_ms(100)
        self.demands: list[Demand] = []
        used_ms = budget_ms = 0.0
        for requests, share, work, room in jobs:
            demand = Demand(requests, share * options.reachable * requests, work, 0.0, options)
            used_ms += cost_ms(demand.cheapest, self.prices) * work
            budget_ms = demand.budget_ms = max(budget_ms, used_ms * room)
            self.demands.append(demand)

    def select(self, policy: str) -> list[Split]:
        return get_selection_policy(policy).select(self.demands, self.prices, self.promised)

    def accuracy(self, splits: Sequence[Split]) -> float:
        return sum(self.promised[strategy] * count for split in splits for strategy, count in split.items())

    def best_accuracy(self) -> float:
        """Of the exact integer program."""
        optimize = pytest.importorskip("scipy.optimize")
        jobs, options = len(self.demands), len(self.strategies)
        promised = np.array([self.promised[strategy] for strategy in self.strategies])
        prices = np.array([self.prices[strategy] for strategy in self.strategies])
        each_job = np.eye(jobs)
        up_to = np.tril(np.ones((jobs, jobs))) * [demand.work for demand in self.demands]
        requests = [demand.requests for demand in self.demands]
        constraints = [
            optimize.LinearConstraint(np.kron(each_job, np.ones(options)), requests, requests),
            optimize.LinearConstraint(
                np.kron(each_job, promised), lb=[demand.needed_sum - EPSILON for demand in self.demands]
            ),
            optimize.LinearConstraint(
                np.kron(up_to, prices), ub=[demand.budget_ms + EPSILON for demand in self.demands]
            ),
        ]
        result = optimize.milp(
            -np.tile(promised, jobs),
            integrality=np.ones(jobs * options),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        assert result.status == 0, result.message
        return -float(result.fun)


JOBS = st.lists(
    st.tuples(st.integers(1, 5), st.floats(0.0, 1.0), st.sampled_from([1.0, 1.0, 2.5]), st.floats(1.0, 3.0)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("policy", ["cheapest", "random", "maximize"])
@given(random_profiles(), JOBS)
def test_every_promise_and_every_budget_is_kept(
    policy: str, profile: Profile, jobs: list[tuple[int, float, float, float]]
) -> None:
    queue = Queue(profile, jobs)
    used_ms = 0.0
    for demand, split in zip(queue.demands, queue.select(policy), strict=True):
        assert sum(split.values()) == demand.requests
        assert queue.accuracy([split]) >= demand.needed_sum - 2 * EPSILON
        used_ms += cost_ms(split, queue.prices) * demand.work
        assert used_ms <= demand.budget_ms * (1 + 1e-9)


@given(random_profiles(), JOBS)
def test_maximize_is_near_the_exact_integer_program(
    profile: Profile, jobs: list[tuple[int, float, float, float]]
) -> None:
    queue = Queue(profile, jobs)
    chosen, best = queue.accuracy(queue.select("maximize")), queue.best_accuracy()
    step = max(queue.promised) - min(queue.promised[strategy] for strategy in queue.strategies)
    assert chosen <= best + 1e-6
    assert best - chosen <= step * len(jobs) + 1e-6  # less than one request's step for each deadline


def test_maximize_is_exact_where_steps_come_out_even() -> None:
    """All steps save 8 ms: the fractional optimum is whole. Two steps are needed for the first job, four in all."""
    queue = Queue(two_speeds(batch_ms=0.001), [(6, 0.0, 1.0, 1.0)] * 2)
    for demand, budget_ms in zip(queue.demands, (44.1, 88.1), strict=True):
        demand.budget_ms = budget_ms
    splits = queue.select("maximize")
    assert sum(split.get(AUDIO, 0) for split in splits) == 4
    assert queue.accuracy(splits) == pytest.approx(queue.best_accuracy())


@pytest.mark.parametrize("policy", ["cheapest", "random", "maximize"])
def test_a_strategy_below_the_hull_is_used_where_the_hull_has_none(policy: str) -> None:
    """From the best the hull goes straight to the worst, which promises too little."""
    profile = profile_of(
        entry("audio+video", 0.9, 10.0), entry("audio+video@0.2", 0.72, 8.0), entry("audio+video@0.5", 0.3, 1.0)
    )
    queue = Queue(profile, [(2, 0.75, 1.0, 1.0)] * 2)
    assert queue.select(policy) == [{1: 2}, {1: 2}]


def test_every_prefix_has_its_own_budget() -> None:
    """The second job is short of 8 ms. One budget for the whole queue would see no need to act: the last job has
    plenty. And a step of the last job would not help the second."""
    queue = Queue(two_speeds(batch_ms=0.001), [(1, 0.0, 1.0, 1.0)] * 3)
    for demand, budget_ms in zip(queue.demands, (10.01, 15.0, 100.0), strict=True):
        demand.budget_ms = budget_ms
    for policy in ("cheapest", "random", "maximize"):
        splits = queue.select(policy)
        assert {AUDIO: 1} in splits[:2]
        assert splits[2] == {FULL: 1}


def test_cheapest_lowers_everyone_up_to_the_violator() -> None:
    queue = Queue(two_speeds(batch_ms=0.001), [(1, 0.0, 1.0, 1.0)] * 4)
    for demand, budget_ms in zip(queue.demands, (100.0, 100.0, 29.0, 100.0), strict=True):
        demand.budget_ms = budget_ms
    assert queue.select("cheapest") == [{AUDIO: 1}, {AUDIO: 1}, {AUDIO: 1}, {FULL: 1}]


def test_full_changes_nothing() -> None:
    queue = Queue(two_speeds(), [(3, 0.0, 1.0, 1.0), (1, 1.0, 1.0, 1.0)])
    assert queue.select("full") == [{FULL: 3}, {FULL: 1}]


def test_full_gives_way_to_a_promise_it_cannot_keep() -> None:
    profile = profile_of(entry("audio+video", 0.7, 10.0), entry("audio", 0.8, 2.0))
    queue = Queue(profile, [(2, 0.5, 1.0, 1.0), (2, 1.0, 1.0, 1.0)])
    assert queue.select("full") == [{0: 2}, {1: 2}]


def test_maximize_takes_the_best_bargains_first() -> None:
    """Two sets of options: giving up the expensive strategy of one costs less accuracy per ms than of the other."""
    profile = profile_of(
        entry("audio+video", 0.9, 20.0),
        entry("audio", 0.85, 10.0),
        entry("text+video", 0.9, 20.0),
        entry("text", 0.6, 10.0),
    )
    latency = LatencyModel(profile)
    options = [StrategyOptions(profile, modalities, latency) for modalities in (("text", "video"), ("audio", "video"))]
    demands = [Demand(2, 0.0, 1.0, 0.0, each) for each in options]
    prices = latency.request_ms(100)
    demands[0].budget_ms = 100.0
    demands[1].budget_ms = 4 * prices[0] - 15.0
    assert get_selection_policy("maximize").select(demands, prices, options[0].promised) == [{2: 2}, {1: 2}]


def test_large_jobs_keep_their_promise_too() -> None:
    queue = Queue(two_speeds(), [(100, 0.95, 1.0, 1.2)])
    (demand,) = queue.demands
    for split in (demand.cheapest, *queue.select("maximize")):
        assert sum(split.values()) == 100
        assert queue.accuracy([split]) >= demand.needed_sum - EPSILON
    assert demand.cheapest[AUDIO] > 0


def test_policies_go_by_their_names() -> None:
    assert list(POLICIES) == ["full", "cheapest", "random", "maximize"]
    with pytest.raises(StrategyError, match="unknown selection policy 'best'; known are full, cheapest"):
        get_selection_policy("best")
