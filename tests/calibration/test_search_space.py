"""Search spaces: everything in them is possible, and what is given stays as it is."""

import pytest

from skipkernels.calibration.search_space import SearchSpace
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import SkipPolicy

LAYERS = 12


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
