"""Requests, jobs and their answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from skipkernels.modality.errors import JobError
from skipkernels.modality.strategy import Inputs, Strategy


@dataclass(frozen=True)
class Request:
    """One input of a model.

    Args:
        inputs: data by modality name. Of a request that lacks modalities, only strategies without them can be chosen.
        work: its cost as a multiple of the profiled requests' cost, for models whose requests differ in length. A
            batch takes as long as its largest request makes it.
        prompt_tokens, new_tokens: of models that decode, where a simulation is to know its steps; 0: not said.
    """

    inputs: Inputs = field(repr=False)
    work: float = 1.0
    prompt_tokens: int = 0
    new_tokens: int = 0

    def __post_init__(self) -> None:
        if not self.inputs:
            raise JobError("a request holds no modality; give at least one")
        if not (_is_number(self.work) and 0.0 < self.work < math.inf):
            raise JobError(f"work must be a positive multiple of a profiled request's, got {self.work!r}")

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset(self.inputs)


@dataclass(frozen=True)
class Job:
    """Requests with one deadline and one accuracy requirement.

    Args:
        requests: at least one, all of the same modalities.
        deadline_ms: from arrival to the completion of the last request; infinity: none. Jobs without a deadline run
            after those with one.
        min_accuracy: lower bound on the mean accuracy that the strategies of the job's requests promise, in [0, 1]. A
            promise is a lower confidence bound on the model's mean score over inputs like the validation set's. It is a
            guarantee on the average, not for each request.
        skip_level: None: any; else only strategies of this level are chosen.
        max_kl: None: any; else the largest skip level is taken whose measured KL from the dense model, in nats, is at
            most this.
    """

    requests: Sequence[Request]
    deadline_ms: float = math.inf
    min_accuracy: float = 0.0
    skip_level: float | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "requests", tuple(self.requests))
        if not self.requests:
            raise JobError("a job needs at least one request, got none")
        if len({request.modalities for request in self.requests}) > 1:
            raise JobError("the requests of a job must hold the same modalities; make one job for each kind")
        if not (_is_number(self.deadline_ms) and self.deadline_ms > 0.0):  # NaN fails too
            raise JobError(f"deadline_ms must be a positive number of milliseconds, got {self.deadline_ms!r}")
        if not (_is_number(self.min_accuracy) and 0.0 <= self.min_accuracy <= 1.0):
            raise JobError(f"min_accuracy must lie in [0, 1], got {self.min_accuracy!r}")
        if self.max_kl is not None and not (_is_number(self.max_kl) and self.max_kl >= 0.0):
            raise JobError(f"max_kl is a KL divergence in nats of at least 0, got {self.max_kl!r}")

    @property
    def modalities(self) -> frozenset[str]:
        return self.requests[0].modalities

    def check_modalities(self, known: Collection[str]) -> None:
        """Raises JobError when a request holds a modality that is not ``known``."""
        unknown = sorted(self.modalities - set(known))
        if unknown:
            raise JobError(f"unknown modality {unknown[0]!r}; this model takes {', '.join(sorted(known))}")


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    output: Any = field(repr=False)
    strategy: Strategy
    time_ms: float  # from the job's arrival to the end of this request's batch
    promised_accuracy: float  # of the strategy
    retried: bool  # its first batch failed, or the worker was lost
    kl: float | None = None  # measured, of the strategy, in nats per token; None: not measured


@dataclass(frozen=True)
class JobAnswer:
    """The answers to a job, in the order of its requests."""

    answers: tuple[Answer, ...]
    time_ms: float  # from arrival to the end of the last batch
    promised_accuracy: float  # mean over the requests, at least the job's min_accuracy
    deadline_met: bool


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
