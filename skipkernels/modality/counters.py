"""Counts of what a scheduler has done, for metrics and reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """Jobs unless said otherwise. ``accepted`` is always waiting + running + ``answered`` + ``failed``."""

    accepted: int = 0
    refused: int = 0
    answered: int = 0
    failed: int = 0
    violations: int = 0  # answered past the deadline
    batches: int = 0
    retried_requests: int = 0
    raised_levels: int = 0  # running requests that took a cheaper strategy to be in time
    requests_by_strategy: Counter[str] = field(default_factory=Counter)  # answered ones
