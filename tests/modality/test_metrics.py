"""A run's figures, counted by hand."""

import pytest

from skipkernels.modality.errors import JobError
from skipkernels.modality.job import Answer, JobAnswer
from skipkernels.modality.metrics import Outcome, summarise
from skipkernels.modality.strategy import Strategy
from tests.modality.profiles import job


def outcome(
    at_ms: float, time_ms: float, *, met: bool, scores: tuple[float, ...] = (), retried: bool = False
) -> Outcome:
    answer = Answer(None, Strategy(("audio",)), time_ms, 0.75, retried)
    return Outcome(at_ms, job(2, 10.0, 0.5), JobAnswer((answer, answer), time_ms, 0.75, met), scores=scores)


def test_a_runs_figures() -> None:
    summary = summarise(
        [
            outcome(100.0, 10.0, met=True, scores=(1.0, 0.0)),
            outcome(200.0, 30.0, met=False, scores=(1.0, 1.0), retried=True),
            Outcome(250.0, job(4, 10.0), None, "refused"),
            outcome(300.0, 100.0, met=True, scores=(0.0, 0.0)),
        ]
    )
    assert summary.jobs == 4
    assert summary.offered_per_s == pytest.approx(10 / 0.2)
    assert summary.throughput_per_s == pytest.approx(6 / 0.3)  # the last answer came at 400
    assert summary.violation_ratio == 0.5
    assert summary.lost == 1
    assert summary.completion_mean_ms == pytest.approx(140 / 3)
    assert summary.completion_p99_ms == pytest.approx(98.6)
    assert (summary.required_accuracy, summary.promised_accuracy, summary.achieved_accuracy) == (0.5, 0.75, 0.5)
    assert summary.promise_kept is True
    assert summary.retried_requests == 2


def test_without_scores_nothing_is_said_of_the_promise() -> None:
    summary = summarise([outcome(0.0, 1.0, met=True), outcome(5.0, 1.0, met=True)])
    assert (summary.achieved_accuracy, summary.promise_kept) == (None, None)
    assert (
        summarise([outcome(0.0, 1.0, met=True, scores=(0.0, 0.0))] * 2 + [outcome(9.0, 1.0, met=True)]).promise_kept
        is False
    )


def test_a_run_without_answers_has_no_figures() -> None:
    refused = Outcome(1.0, job(1, 10.0), None, "no room")
    with pytest.raises(JobError, match=r"2 jobs with 0 answered has no figures.*\. The first reason: no room"):
        summarise([refused, refused])
    with pytest.raises(JobError, match="a run of 1 jobs with 1 answered"):
        summarise([outcome(0.0, 1.0, met=True)])


def test_runs_count_together_each_in_its_own_time() -> None:
    first = [outcome(0.0, 10.0, met=True), outcome(100.0, 100.0, met=True)]
    second = [outcome(5000.0, 50.0, met=False), outcome(5300.0, 100.0, met=True)]
    summary = summarise(first, second)
    assert summary.jobs == 4
    assert summary.offered_per_s == pytest.approx(8 / 0.4)
    assert summary.throughput_per_s == pytest.approx(8 / 0.6)
    assert summary.violation_ratio == 0.25
    refused = [Outcome(at_ms, job(1, 10.0), None, "refused") for at_ms in (0.0, 100.0)]
    assert summarise(first, refused).throughput_per_s == pytest.approx(4 / 0.2)
