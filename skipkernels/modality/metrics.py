"""Outcomes of a run's jobs, and summary figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skipkernels.modality.errors import JobError
from skipkernels.modality.job import Job, JobAnswer


@dataclass(frozen=True)
class Outcome:
    """One job of a run."""

    at_ms: float  # when it came
    job: Job
    answer: JobAnswer | None  # None: refused or failed
    failure: str | None = None
    scores: tuple[float, ...] = ()  # of its outputs, where the right answers are known


@dataclass(frozen=True)
class Summary:
    """A run. Ratios are of jobs; accuracies are means over answered requests."""

    jobs: int
    offered_per_s: float  # requests, from the first arrival to the last
    throughput_per_s: float  # answered requests, from the first arrival to the last answer
    violation_ratio: float  # late, refused or failed
    lost: int  # refused or failed
    completion_mean_ms: float  # from arrival to the last answer of a job
    completion_p99_ms: float
    required_accuracy: float
    promised_accuracy: float
    achieved_accuracy: float | None  # None: no scores
    retried_requests: int

    @property
    def promise_kept(self) -> bool | None:
        """Whether the mean accuracy reached what the jobs required; None: no scores."""
        return None if self.achieved_accuracy is None else self.achieved_accuracy >= self.required_accuracy


def summarise(*runs: Sequence[Outcome]) -> Summary:
    """
    Args:
        runs: their jobs are pooled; durations are summed over the runs.

    Raises:
        JobError: fewer than two jobs came, or none was answered.
    """
    outcomes = [outcome for run in runs for outcome in run]
    answered = [(outcome, outcome.answer) for outcome in outcomes if outcome.answer is not None]
    if len(outcomes) < 2 or not answered:
        reasons = [outcome.failure for outcome in outcomes if outcome.failure]
        raise JobError(
            f"a run of {len(outcomes)} jobs with {len(answered)} answered has no figures; two and one are needed"
            + (f". The first reason: {reasons[0]}" if reasons else "")
        )
    requests = sum(len(answer.answers) for _, answer in answered)
    times_ms = np.array([answer.time_ms for _, answer in answered])
    scores = [score for outcome, _ in answered for score in outcome.scores]
    return Summary(
        jobs=len(outcomes),
        offered_per_s=sum(len(outcome.job.requests) for outcome in outcomes) / sum(map(_coming_ms, runs)) * 1e3,
        throughput_per_s=requests / sum(map(_running_ms, runs)) * 1e3,
        violation_ratio=1.0 - sum(answer.deadline_met for _, answer in answered) / len(outcomes),
        lost=len(outcomes) - len(answered),
        completion_mean_ms=float(times_ms.mean()),
        completion_p99_ms=float(np.quantile(times_ms, 0.99)),
        required_accuracy=sum(o.job.min_accuracy * len(answer.answers) for o, answer in answered) / requests,
        promised_accuracy=sum(a.promised_accuracy for _, answer in answered for a in answer.answers) / requests,
        achieved_accuracy=sum(scores) / len(scores) if scores else None,
        retried_requests=sum(a.retried for _, answer in answered for a in answer.answers),
    )


def _coming_ms(run: Sequence[Outcome]) -> float:
    """From the first arrival to the last."""
    return max(outcome.at_ms for outcome in run) - min(outcome.at_ms for outcome in run)


def _running_ms(run: Sequence[Outcome]) -> float:
    """From the first arrival to the last answer."""
    first_ms = min(outcome.at_ms for outcome in run)
    answered_ms = (outcome.at_ms + answer.time_ms for outcome in run if (answer := outcome.answer))
    return max(answered_ms, default=first_ms) - first_ms
