"""Contenders on the same arrivals."""

from pathlib import Path

import pytest

from skipkernels.benchmark.serving.comparison import Load, compare
from skipkernels.benchmark.serving.contender import Contender, contenders
from skipkernels.benchmark.serving.plots import plot_comparison, plot_frontier
from skipkernels.modality.errors import JobError
from skipkernels.modality.policies import POLICIES
from skipkernels.workloads.arrivals import bursty
from skipkernels.workloads.synthetic import tvlt_mosei
from skipkernels.workloads.workload import Workload
from tests.modality.profiles import two_speeds


def test_selection_carries_more_than_full_modality_on_the_originals_profile(tmp_path: Path) -> None:
    profile, workload = tvlt_mosei(), Workload(extra_ms=55.0, slack=0.03)
    stages: list[float] = []
    results = compare(
        contenders(profile, list(POLICIES)),
        workload,
        overload_per_s=60.0,
        jobs=250,
        progress=lambda stage, share: stages.append(share),
    )
    full, cheapest, random, maximize = results
    assert [result.contender for result in results] == ["full", "cheapest", "random", "maximize"]
    assert stages == sorted(stages)
    for result in (cheapest, random, maximize):
        assert result.capacity.violation_ratio <= 0.01
        assert result.capacity.throughput_per_s > 3.6 * full.capacity.throughput_per_s
        assert 11 * result.overload.completion_mean_ms < full.overload.completion_mean_ms
    for result in results:
        for summary in (result.capacity, result.overload):
            assert summary.promised_accuracy >= summary.required_accuracy
            # each of at least as many requests as jobs is right or wrong: three standard errors of that mean
            assert summary.achieved_accuracy >= summary.required_accuracy - 3 * (0.7 * 0.3 / summary.jobs) ** 0.5
        assert result.overload.lost == 0
    assert maximize.overload.promised_accuracy > cheapest.overload.promised_accuracy
    plot_comparison(results, tmp_path / "comparison.png", "original workload, simulated")
    plot_frontier(profile, tmp_path / "frontier.png")
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("comparison.png", "frontier.png"))


def test_the_found_rate_is_the_highest() -> None:
    profile, workload = two_speeds(), Workload(extra_ms=30.0, slack=0.2)
    contender = Contender("maximize", "maximize", profile)
    (result,) = compare(
        [contender],
        workload,
        overload_per_s=50.0,
        max_violations=0.1,
        jobs=300,
        process=bursty,
        seed=4,
    )
    assert result.capacity.violation_ratio <= 0.1
    load = Load.draw(workload, 300, 4, bursty)
    higher = load.run(workload, contender, 1, 1.3 * result.capacity.offered_per_s)
    assert higher.violation_ratio > 0.1


def test_a_workload_that_cannot_be_met_is_an_error() -> None:
    with pytest.raises(JobError, match="this does not depend on the rate"):
        compare(
            contenders(two_speeds(spread=3.0), ["full"]),
            Workload(extra_ms=-5.0, slack=0.0),
            overload_per_s=1.0,
            jobs=20,
        )
