"""Who competes with whom."""

import pytest

from skipkernels.benchmark.serving.contender import contenders
from skipkernels.modality.errors import StrategyError
from tests.modality.profiles import entry, profile_of, two_speeds


def test_where_strategies_have_two_dimensions_each_competes_alone() -> None:
    profile = profile_of(*(entry(name, 0.8, 1.0) for name in ("audio+video", "audio+video@0.2", "audio", "audio@0.2")))
    listed = {contender.name: contender for contender in contenders(profile, ["full", "maximize"])}
    strategies = {
        name: [entry.strategy.name for entry in contender.profile.strategies] for name, contender in listed.items()
    }
    assert strategies == {
        "full": ["audio+video@0", "audio+video@0.2", "audio@0", "audio@0.2"],
        "maximize": ["audio+video@0", "audio+video@0.2", "audio@0", "audio@0.2"],
        "modalities only": ["audio+video@0", "audio@0"],
        "skipping only": ["audio+video@0", "audio+video@0.2"],
    }
    assert [contender.selection for contender in listed.values()] == ["full", "maximize", "maximize", "maximize"]
    everything = {contender.profile.full({"audio", "video"}).strategy for contender in listed.values()}
    assert {strategy.name for strategy in everything} == {"audio+video@0"}


def test_one_dimension_is_not_divided() -> None:
    assert [contender.name for contender in contenders(two_speeds(), ["maximize", "full"])] == ["maximize", "full"]
    profile = profile_of(entry("audio+video", 0.8, 1.0), entry("audio@0.2", 0.8, 1.0))
    assert len(contenders(profile, ["maximize"])) == 1
    assert len(contenders(profile, ["full"])) == 1


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(StrategyError, match="unknown selection policy 'fastest'"):
        contenders(two_speeds(), ["fastest"])
