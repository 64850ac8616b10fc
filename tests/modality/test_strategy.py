"""Strategies: one name each, and none that is impossible."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.modality.errors import StrategyError
from skipkernels.modality.strategy import Strategy, all_strategies

MODALITIES = st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), min_size=1, max_size=4, unique=True)
LEVELS = st.floats(0.0, 1.0, exclude_max=True)


@given(MODALITIES, LEVELS)
def test_a_strategy_survives_its_name(modalities: list[str], level: float) -> None:
    strategy = Strategy(tuple(modalities), level)
    assert Strategy.parse(strategy.name) == strategy
    assert Strategy(tuple(reversed(modalities)), level) == strategy


@given(MODALITIES, MODALITIES, LEVELS, LEVELS)
def test_strategies_share_a_name_only_when_equal(one: list[str], other: list[str], low: float, high: float) -> None:
    first, second = Strategy(tuple(one), low), Strategy(tuple(other), high)
    assert (first.name == second.name) == (first == second)


def test_names_are_short() -> None:
    assert Strategy(("video", "audio"), 0.25).name == "audio+video@0.25"
    assert Strategy(("audio",)).name == "audio@0"
    assert Strategy.parse("audio") == Strategy(("audio",), 0)


@pytest.mark.parametrize(
    ("modalities", "level", "message"),
    [
        ((), 0.0, "at least one modality"),
        (("audio", "audio"), 0.0, "each once"),
        (("Audio",), 0.0, "lower-case letters.*got 'Audio'"),
        (("a+b",), 0.0, r"got 'a\+b'"),
        ((3,), 0.0, "got 3"),
        (("audio",), 1.0, r"in \[0, 1\), got 1.0"),
        (("audio",), -0.1, "got -0.1"),
        (("audio",), math.nan, "got nan"),
    ],
)
def test_an_impossible_strategy_is_refused(modalities: Any, level: float, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        Strategy(modalities, level)


@pytest.mark.parametrize("name", ["", "@0.5", "audio@", "audio@half", "audio@1", "audio+", "audio@0.1@0.2"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(StrategyError, match="not a strategy like"):
        Strategy.parse(name)


def test_all_strategies_are_subsets_times_levels() -> None:
    assert {strategy.name for strategy in all_strategies(("audio", "video"), (0.0, 0.5))} == {
        f"{kept}@{level}" for kept in ("audio", "video", "audio+video") for level in ("0", "0.5")
    }
    assert [strategy.name for strategy in all_strategies(("image", "text"), required=("text",))] == [
        "image+text@0",
        "text@0",
    ]
    with pytest.raises(StrategyError, match="required modality 'text' is not among audio, video"):
        all_strategies(("audio", "video"), required=("text",))
