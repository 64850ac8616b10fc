"""Profiles and jobs that tests make up."""

from collections.abc import Sequence

from hypothesis import strategies as st

from skipkernels.modality.job import Job, Request
from skipkernels.modality.profile import Profile, StrategyProfile, Timing
from skipkernels.modality.strategy import Strategy

BOTH = ("audio", "video")


def entry(
    name: str,
    accuracy: float,
    request_ms: float,
    *,
    batch_ms: float = 1.0,
    sizes: Sequence[int] = (1, 2, 4, 8),
    spread: float = 1.0,
    request_bytes: int | None = None,
    samples: int = 10_000,
) -> StrategyProfile:
    """A batch takes ``batch_ms`` and ``request_ms`` for each request."""
    timings = []
    for size in sizes:
        median_ms = batch_ms + request_ms * size
        peak = None if request_bytes is None else request_bytes * size
        timings.append(Timing(size, median_ms, median_ms * spread, peak))
    return StrategyProfile(Strategy.parse(name), tuple(timings), accuracy * samples, samples)


def profile_of(*entries: StrategyProfile) -> Profile:
    return Profile("toy", "toy-1", "cpu", "fp32", entries)


def two_speeds(**settings: object) -> Profile:
    """Everything in 10 ms a request, audio alone in 2 ms."""
    return profile_of(
        entry("audio+video", 0.9, 10.0, **settings),  # type: ignore[arg-type]
        entry("audio", 0.8, 2.0, **settings),  # type: ignore[arg-type]
    )


def job(requests: int, deadline_ms: float, min_accuracy: float = 0.0) -> Job:
    return Job([Request(dict.fromkeys(BOTH, 0))] * requests, deadline_ms, min_accuracy)


@st.composite
def random_profiles(draw: st.DrawFn, most: int = 5) -> Profile:
    """Strategies of the same two modalities, any accuracies and times."""
    levels = draw(st.integers(1, most))
    return profile_of(
        *(
            entry(
                f"audio+video@{level / 10}",
                draw(st.integers(1, 99)) / 100,
                draw(st.integers(1, 40)) / 2,
                batch_ms=draw(st.integers(0, 20)) / 2 + 0.5,
                sizes=(1, 2, 4),
            )
            for level in range(levels)
        )
    )
