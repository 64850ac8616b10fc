"""The largest saving within a budget, on landscapes where it is known."""

from collections.abc import Callable, Sequence
from typing import cast

import pytest

from skipkernels.calibration.budget import largest_within
from skipkernels.calibration.calibration import _Search
from skipkernels.calibration.policy_search import Unreachable
from skipkernels.calibration.scoring import Comparison
from skipkernels.calibration.search_space import SearchSpace
from skipkernels.calibration.speed import Gain, Speed
from skipkernels.calibration.tuning import Decoder, Kind, Trial
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import DensePolicy, Policy


def landscape(kl: Callable[[float], float], asked: list[float] | None = None) -> Callable[[float], Trial]:
    def try_at(wanted: float) -> Trial:
        if asked is not None:
            asked.append(wanted)
        comparison = Comparison(wanted, wanted, 1.0, kl(wanted), 1.0, 1.0, 100, 12)
        return Trial("neurons", DensePolicy(), comparison, (kl(wanted),), wanted)

    return try_at


@pytest.mark.parametrize("exponent", [1.5, 2.5, 3.5])
@pytest.mark.parametrize("limit", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("first", [0.1, 0.25, 0.6])
def test_the_largest_is_close_to_the_budget_from_above_and_from_below(
    exponent: float, limit: float, first: float
) -> None:
    """Steps are guided by an exponent of 2.5, which a model need not have."""
    found = largest_within(0.1, landscape(lambda s: 0.1 * (s / limit) ** exponent), first, 0.66).required(0.1)
    assert found.comparison.kl <= 0.1
    assert found.comparison.skip_ratio > 0.75 * limit


def test_what_costs_more_than_the_budget_is_never_returned() -> None:
    """However steep, and where a step down costs no less."""
    for kl in (lambda s: 0.1001, lambda s: 1.0 + s, lambda s: 0.2 - 0.01 * s):
        found = largest_within(0.1, landscape(kl), 0.3, 0.6)
        assert found.largest is None
        with pytest.raises(PolicyError, match=r"costs at most 0\.1 nats: the smallest divergence measured is"):
            found.required(0.1)


@pytest.mark.parametrize("kl", [lambda s: 0.2 + s, lambda s: 0.8 - s])
def test_the_smallest_measured_is_named(kl: Callable[[float], float]) -> None:
    """Also where a smaller saving cost more, as by chance it may."""
    tried: list[float] = []
    found = largest_within(1e-5, landscape(kl, tried), 0.3, 0.6)
    at = min(tried, key=kl)
    assert found.cheapest.wanted == at
    with pytest.raises(PolicyError, match=f"is {kl(at):.4g} nats, at {at:.1%} of the FFN bytes"):
        found.required(1e-5)


def test_nothing_above_the_ceiling_is_tried_and_savings_of_nothing_are_no_answer() -> None:
    tried: list[float] = []
    found = largest_within(1.0, landscape(lambda s: 1e-9, tried), 0.2, 0.5)
    assert max(tried) == 0.5
    assert found.required(1.0).wanted == 0.5
    none = lambda wanted: Trial("fixed", DensePolicy(), Comparison(0, 0, 1, 0, 1, 1, 9, 9), (0.0,), wanted)  # noqa: E731
    assert largest_within(1.0, none, 0.2, 0.5).largest is None


class Kinds(_Search):
    """Neurons that cost ``dear`` times the budget at a saving of 0.2; and fixed blocks that save more than asked, cost
    more than the budget, and would be the better ones at an equal saving."""

    def __init__(self, dear: float) -> None:
        self._dear, self._most = dear, 2 / 3
        self._space, self._warmup, self._decoder = SearchSpace(12), 1, cast(Decoder, self)

    def share_past_warmup(self, warmup_tokens: int) -> float:
        return 1.0

    def trials(self, wanted: float, kinds: Sequence[Kind]) -> list[Trial]:
        found = [self.try_out(kind, DensePolicy(), wanted, 1) for kind in kinds]
        return sorted(found, key=lambda trial: trial.rank)

    def try_out(self, kind: Kind, policy: Policy, wanted: float, warmup_tokens: int) -> Trial:
        ratio, kl = (wanted, 0.05 * self._dear * (wanted / 0.2) ** 3) if kind == "neurons" else (1.2 * wanted, 0.055)
        return Trial(kind, policy, Comparison(ratio, ratio, 1.0, kl, 1.0, 1.0, 100, 12), (kl,) * 4, wanted)


@pytest.mark.parametrize("dear", [0.3, 1.0, 4.0])
def test_the_first_is_within_the_budget_and_the_baselines_are_measured_at_its_saving(dear: float) -> None:
    search = Kinds(dear)
    kinds: list[Kind] = ["neurons", "fixed"]
    trials = search.trials(0.2, ["neurons"])
    verified, trials = search.within(0.05, cast(Decoder, search), trials, kinds, trials)
    assert verified[0].kind == "neurons"
    assert 0.035 < verified[0].comparison.kl <= 0.05
    if verified[0].wanted != 0.2:
        assert {trial.kind for trial in verified} == {*kinds}
        assert {trial.wanted for trial in (*verified, *trials)} == {verified[0].wanted}


def test_a_gain_is_the_median_of_the_rounds_of_the_policy_by_the_dense_model() -> None:
    dense, policy = Speed(100.0, 0.0, (100.0, 90.0, 120.0)), Speed(110.0, 0.25, (110.0, 108.0, 60.0))
    found = Gain.of(dense, policy, 128)
    assert (found.low, found.ratio, found.high) == pytest.approx((0.5, 1.1, 1.2))
    assert found.faster
    assert not Gain.of(policy, dense, 128).faster


def test_a_kind_that_cannot_save_less_ends_the_search() -> None:
    def blocks(wanted: float) -> Trial:
        if wanted < 0.1:
            raise Unreachable("one block")
        return landscape(lambda s: 1.0)(wanted)

    assert largest_within(0.01, blocks, 0.2, 0.5).largest is None
