"""The clock is passed in: the scheduler reads it and never sleeps, so that it runs on virtual time too."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Milliseconds since some fixed moment; never goes back."""


def real_clock() -> float:
    return time.monotonic() * 1e3


class VirtualClock:
    """A clock that a simulation sets."""

    def __init__(self) -> None:
        self.now_ms = 0.0

    def __call__(self) -> float:
        return self.now_ms

    def advance_to(self, now_ms: float) -> None:
        assert now_ms >= self.now_ms, f"from {self.now_ms} back to {now_ms} ms"
        self.now_ms = now_ms
