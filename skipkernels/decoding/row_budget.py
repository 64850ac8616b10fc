"""RowBudget: how many prompt rows a step may have before running streams notice."""

from __future__ import annotations

import numpy as np

SLOWDOWN = 2.5
"""A step with prompt rows may take so many times a step without, where answers are streaming."""
_LEAST = 8
"""At the beginning of a prompt: fewer rows hardly make a step shorter, since every weight is read once anyway, and a
short answer waits longer for its own prompt. Late in a long prompt, where a row looks at thousands of positions, as
many as cost the same. Beside a prompt of 3,000 tokens a stream's longest gap was 4.0 and 4.4 times its usual one, and
12.5 and 4.7 with 8 rows everywhere; a short answer behind a long one took 141 and 146 ms, and 160 and 140 (two runs in
turns, SmolLM2-135M Q4_1, two Zen 4 cores, AVX-512, 2026-11-26; ``bench/waits.py``)."""
_WEIGHT = 0.3
"""Of a new measurement in the running mean of a step without prompt rows."""
_FORGETS = 0.99
"""Weight that is left of a step with prompt rows when the next one comes: a long prompt's beginning still counts at its
end."""

_APART = 64
"""Positions (as a standard deviation) that measured rows have to lie apart before a slope is more than chance."""


class RowBudget:
    """Learns from the steps what a prompt row costs, as a line over its position, since it looks at all that come
    before it; and allows as many as ``SLOWDOWN`` leaves room for, all of them where nobody decodes. A long prompt then
    slows a stream down and never stops it (Sarathi-Serve, arXiv 2403.02310)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._step_s: float | None = None  # without prompt rows
        self._sums = np.zeros(5)  # of weight, position, its square, cost, cost times position

    def rows(self, decoding: bool) -> int:
        """Prompt rows at the beginning of a prompt."""
        first_s, _ = self._line
        if not decoding:
            return self._capacity
        if self._step_s is None or first_s <= 0.0:
            return min(_LEAST, self._capacity)
        allowed = int((SLOWDOWN - 1) * self._step_s / first_s)
        return min(self._capacity, max(_LEAST, allowed))

    @property
    def growth(self) -> float:
        """What each position before it adds to the cost of a prompt row, as a share of the first row's."""
        first_s, position_s = self._line
        return position_s / first_s if first_s > 0.0 else 0.0

    def measured(self, prompt_rows: int, decode_rows: int, seconds: float, position: float = 0.0) -> None:
        """Tells it what a step took; ``position`` is the mean of its prompt rows."""
        if prompt_rows == 0:
            self._step_s = _mean(self._step_s, seconds)
            return
        base = self._step_s or 0.0 if decode_rows else 0.0
        cost = max(seconds - base, 0.1 * seconds) / prompt_rows
        self._sums *= _FORGETS
        # a step's share of what is known is that of its rows: of two, a large part is chance
        self._sums += prompt_rows * np.array([1.0, position, position**2, cost, cost * position])

    @property
    def _line(self) -> tuple[float, float]:
        """Cost in seconds of a row at position 0, and what each position adds; neither is negative."""
        weight, at, square, cost, product = self._sums.tolist()
        if weight == 0.0:
            return 0.0, 0.0
        spread = square - at**2 / weight
        slope = max(0.0, (product - at * cost / weight) / spread) if spread > weight * _APART**2 else 0.0
        first = (cost - slope * at) / weight
        if first < 0.1 * cost / weight:  # steeper than a line through what is known
            return 0.1 * cost / weight, 0.9 * cost / at
        return first, slope


def _mean(before: float | None, now: float) -> float:
    return now if before is None else (1 - _WEIGHT) * before + _WEIGHT * now
