"""RowBudget: how many prompt rows a step may have before running streams notice."""

from __future__ import annotations

SLOWDOWN = 2.5
"""A step with prompt rows may take so many times a step without, where answers are streaming."""
_LEAST = 8
"""Fewer rows hardly make a step shorter: every weight is read once anyway. Beside a prompt of 3,000
tokens a stream's longest gap was 4.3 times its usual one with 8 rows, 5.6 times with 16, and the prompt took 8.0 s and
8.1 s (medians of three runs in turns, SmolLM2-135M bf16, two Zen 4 cores, AVX-512, 2026-11-26)."""
_WEIGHT = 0.3
"""Of a new measurement in the running mean."""


class RowBudget:
    """Learns from the steps what a prompt row costs, and allows as many as ``SLOWDOWN`` leaves room for; all of them
    where nobody decodes. A long prompt then slows a stream down and never stops it (Sarathi-Serve, arXiv
    2403.02310)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._step_s: float | None = None  # without prompt rows
        self._row_s: float | None = None

    def rows(self, decoding: bool) -> int:
        if not decoding:
            return self._capacity
        if self._step_s is None or self._row_s is None:
            return min(_LEAST, self._capacity)
        allowed = int((SLOWDOWN - 1) * self._step_s / self._row_s)
        return min(self._capacity, max(_LEAST, allowed))

    def measured(self, prompt_rows: int, decode_rows: int, seconds: float) -> None:
        """Tells it what a step took."""
        if prompt_rows == 0:
            self._step_s = _mean(self._step_s, seconds)
        elif prompt_rows >= _LEAST:
            base = self._step_s or 0.0 if decode_rows else 0.0
            self._row_s = _mean(self._row_s, max(seconds - base, 0.1 * seconds) / prompt_rows)


def _mean(before: float | None, now: float) -> float:
    return now if before is None else (1 - _WEIGHT) * before + _WEIGHT * now
