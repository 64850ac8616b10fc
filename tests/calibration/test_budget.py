"""The largest saving within a budget, on landscapes where it is known."""

from collections.abc import Callable

import pytest

from skipkernels.calibration.budget import largest_within
from skipkernels.calibration.policy_search import Unreachable
from skipkernels.calibration.scoring import Comparison
from skipkernels.calibration.tuning import Trial
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import DensePolicy


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


def test_the_smallest_measured_is_named() -> None:
    tried: list[float] = []
    found = largest_within(1e-5, landscape(lambda s: 0.2 + s, tried), 0.3, 0.6)
    smallest = 0.2 + min(tried)
    assert found.cheapest.comparison.kl == pytest.approx(smallest)
    with pytest.raises(PolicyError, match=f"is {smallest:.4g} nats, at {min(tried):.1%} of the FFN bytes"):
        found.required(1e-5)


def test_nothing_above_the_ceiling_is_tried_and_savings_of_nothing_are_no_answer() -> None:
    tried: list[float] = []
    found = largest_within(1.0, landscape(lambda s: 1e-9, tried), 0.2, 0.5)
    assert max(tried) == 0.5
    assert found.required(1.0).wanted == 0.5
    none = lambda wanted: Trial("fixed", DensePolicy(), Comparison(0, 0, 1, 0, 1, 1, 9, 9), (0.0,), wanted)  # noqa: E731
    assert largest_within(1.0, none, 0.2, 0.5).largest is None


def test_a_kind_that_cannot_save_less_ends_the_search() -> None:
    def blocks(wanted: float) -> Trial:
        if wanted < 0.1:
            raise Unreachable("one block")
        return landscape(lambda s: 1.0)(wanted)

    assert largest_within(0.01, blocks, 0.2, 0.5).largest is None
