"""How far a long piece of work is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]
"""Called as (what is being done, share of the whole that is done)."""


class Meter:
    """Turns counted units of one stage after the other into shares of the whole, which only grow."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stage = ""
        self._begin = self._end = 0.0
        self._planned = 1
        self._done = 0

    def stage(self, name: str, until: float, planned: int) -> None:
        """The stage of ``planned`` units at most that takes the whole from the end of the last stage to ``until``."""
        self._stage, self._begin, self._end = name, self._end, until
        self._planned, self._done = max(1, planned), 0
        self._progress(name, self._begin)

    @property
    def share(self) -> float:
        return self._end

    def count(self, units: int) -> None:
        self._done = min(self._done + units, self._planned)
        self._progress(self._stage, self._begin + (self._end - self._begin) * self._done / self._planned)
