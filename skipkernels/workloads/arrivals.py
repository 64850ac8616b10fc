"""Arrival processes: at which times jobs arrive."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from skipkernels.modality.errors import JobError

Times = npt.NDArray[np.float64]
"""Arrival times in ms, ascending from 0 on."""

Process = Callable[[float, int, np.random.Generator], Times]
"""Called as (jobs per second, number of jobs, generator); returns the arrival times."""


def poisson(jobs_per_s: float, jobs: int, rng: np.random.Generator) -> Times:
    """Independent arrivals."""
    _check(jobs_per_s)
    return np.asarray(np.cumsum(rng.exponential(1e3 / jobs_per_s, jobs)))


def bursty(
    jobs_per_s: float,
    jobs: int,
    rng: np.random.Generator,
    *,
    burst: float = 5.0,
    burst_share: float = 0.1,
    burst_s: float = 2.0,
) -> Times:
    """A Poisson process modulated by a two-state Markov chain: calm, and bursts.

    Args:
        jobs_per_s: mean rate over all time.
        burst: rate in a burst divided by the calm rate.
        burst_share: share of the time in bursts.
        burst_s: mean length of a burst.
    """
    _check(jobs_per_s)
    if not (burst >= 1.0 and 0.0 < burst_share < 1.0 and burst_s > 0.0):
        raise JobError(
            f"bursts need burst >= 1, 0 < burst_share < 1 and burst_s > 0, got {burst}, {burst_share} and {burst_s}"
        )
    calm_per_ms = jobs_per_s / 1e3 / (1.0 + burst_share * (burst - 1.0))
    calm_ms, burst_ms = burst_s * 1e3 * (1.0 - burst_share) / burst_share, burst_s * 1e3
    times: list[float] = []
    now_ms, bursting = 0.0, False
    while len(times) < jobs:
        end_ms = now_ms + rng.exponential(burst_ms if bursting else calm_ms)
        expected = (end_ms - now_ms) * calm_per_ms * (burst if bursting else 1.0)
        times += sorted(rng.uniform(now_ms, end_ms, rng.poisson(expected)))
        now_ms, bursting = end_ms, not bursting
    return np.array(times[:jobs])


def read_trace(path: str | Path) -> Times:
    """Arrival times from a text file: seconds, one number per line, in ascending order. Empty lines and text after
    ``#`` are ignored. Times are shifted so that the first job arrives at 0.

    Raises:
        JobError: unreadable, no times, or a line that is not a time or goes back; the message names the line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read ({error})") from error
    seconds: list[float] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            time_s = float(text)
        except ValueError:
            raise JobError(f"{path}, line {number}: expected seconds like 12.5, got {text!r}") from None
        if not 0.0 <= time_s < math.inf:
            raise JobError(f"{path}, line {number}: a time is finite and not negative, got {text}")
        if seconds and time_s < seconds[-1]:
            raise JobError(f"{path}, line {number}: {text} s is before the line above ({seconds[-1]} s); sort the file")
        seconds.append(time_s)
    if not seconds:
        raise JobError(f"{path}: holds no arrival times")
    return (np.array(seconds) - seconds[0]) * 1e3


def as_recorded(trace: Times) -> Process:
    """A process that scales a trace to any rate, and repeats it when there are more jobs than times."""
    if len(trace) < 2 or trace[-1] <= trace[0]:
        raise JobError(f"a trace of {len(trace)} arrivals at one moment has no rate")
    period_ms = trace[-1] * len(trace) / (len(trace) - 1)

    def process(jobs_per_s: float, jobs: int, rng: np.random.Generator) -> Times:
        _check(jobs_per_s)
        turn, index = np.divmod(np.arange(jobs), len(trace))
        return (turn * period_ms + trace[index]) * (len(trace) / period_ms * 1e3 / jobs_per_s)

    return process


def _check(jobs_per_s: float) -> None:
    if not 0.0 < jobs_per_s < math.inf:
        raise JobError(f"the rate of arrivals must be a positive number of jobs per second, got {jobs_per_s}")
