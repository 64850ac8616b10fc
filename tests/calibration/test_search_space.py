"""Search spaces: everything in them is possible, and what is given stays as it is."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.calibration.search_space import SearchSpace
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import SkipPolicy

LAYERS = 12
policies = st.tuples(st.integers(0, 9), st.integers(0, 9), st.none() | st.integers(1, 10)).filter(
    lambda shape: shape[0] + shape[1] <= LAYERS - 2
)


def shape(policy: SkipPolicy) -> tuple[int, int, int]:
    """Its bounds and how many layers a trigger skips at most."""
    gated = LAYERS - policy.first_dense_layers - policy.last_dense_layers - 1
    return policy.first_dense_layers, policy.last_dense_layers, min(policy.span or gated, gated)


@pytest.mark.parametrize("layers", [2, 3, 12, 24, 36, 80])
def test_every_candidate_is_possible_and_there_are_few(layers: int) -> None:
    candidates = list(SearchSpace(layers).candidates())
    for policy in candidates:
        policy.plan(layers)
    assert 1 <= len(candidates) <= 24 * 24 / 2 * 13
    assert len(set(candidates)) == len(candidates)


def test_spans_reach_half_of_the_layers() -> None:
    assert SearchSpace(24).tried_spans == (None, *range(1, 13))
    assert SearchSpace(80).tried_spans[-1] == 40
    assert len(SearchSpace(80).tried_spans) == 13


def test_given_bounds_are_kept() -> None:
    assert SearchSpace(LAYERS, first_dense_layers=3, last_dense_layers=2).windows() == [(3, 2)]
    assert {start for start, _ in SearchSpace(LAYERS, first_dense_layers=3).windows()} == {3}
    assert {end for _, end in SearchSpace(LAYERS, last_dense_layers=0).windows()} == {0}
    assert {policy.span for policy in SearchSpace(LAYERS, spans=(40,)).candidates()} == {40}
    assert SearchSpace(LAYERS, warmup_tokens=7, batch_rule="all").widest == SkipPolicy(
        first_dense_layers=0, last_dense_layers=0, warmup_tokens=7, batch_rule="all"
    )
    with pytest.raises(PolicyError, match="spans is empty"):
        SearchSpace(LAYERS, spans=())


@given(policies)
def test_a_neighbour_is_possible_and_one_step_away(values: tuple[int, int, int | None]) -> None:
    policy = SkipPolicy(first_dense_layers=values[0], last_dense_layers=values[1], span=values[2], warmup_tokens=3)
    for neighbour in SearchSpace(LAYERS).neighbours(policy):
        neighbour.plan(LAYERS)
        bounds = abs(neighbour.first_dense_layers - policy.first_dense_layers) + abs(
            neighbour.last_dense_layers - policy.last_dense_layers
        )
        assert bounds <= 1
        if bounds == 0:
            # a span of the whole window or more is None, and equals any other such
            assert abs(shape(neighbour)[2] - shape(policy)[2]) <= 1
        assert replace(neighbour, first_dense_layers=0, last_dense_layers=0, span=None) == replace(
            policy, first_dense_layers=0, last_dense_layers=0, span=None
        )


@given(policies)
def test_neighbours_lead_back(values: tuple[int, int, int | None]) -> None:
    space = SearchSpace(LAYERS)
    policy = SkipPolicy(first_dense_layers=values[0], last_dense_layers=values[1], span=values[2])
    for neighbour in space.neighbours(policy):
        if neighbour.span == policy.span:  # else a smaller window cut the span off, and a step back leaves it cut off
            assert shape(policy) in {shape(back) for back in space.neighbours(neighbour)}


def test_what_is_given_has_no_neighbours() -> None:
    policy = SkipPolicy(first_dense_layers=3, last_dense_layers=2, span=2)
    assert list(SearchSpace(LAYERS, spans=(2,), first_dense_layers=3, last_dense_layers=2).neighbours(policy)) == []
    moved = list(SearchSpace(LAYERS, spans=(2,), first_dense_layers=3).neighbours(policy))
    assert [(p.first_dense_layers, p.last_dense_layers, p.span) for p in moved] == [(3, 1, 2), (3, 3, 2)]
