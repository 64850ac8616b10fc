"""What a step of a model takes whose requests join and leave it one by one."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import chain

from skipkernels.modality.errors import ProfileError


@dataclass(frozen=True)
class StepTimes:
    """Profiled times of a step, which has one row for each request that decodes and some for prompts.

    Args:
        decode_ms: (rows, milliseconds), from 1 row on; between two numbers times are interpolated, beyond the largest
            they grow with it.
        positions: what each of those rows had in its cache.
        position_ms: what one more cached position of one row adds.
        prompt_ms: what one token of a prompt adds.
        prompt_rows: tokens of a prompt that such a step takes beside rows that decode.
    """

    decode_ms: tuple[tuple[int, float], ...]
    positions: int
    position_ms: float
    prompt_ms: float
    prompt_rows: float

    def __post_init__(self) -> None:
        rows = [rows for rows, _ in self.decode_ms]
        if not all(map(math.isfinite, chain(*self.decode_ms, (self.position_ms, self.prompt_ms, self.prompt_rows)))):
            raise ProfileError(f"times of steps are finite, got {self}")
        if not rows or rows != sorted({1, *rows}) or min(ms for _, ms in self.decode_ms) <= 0.0:
            raise ProfileError(f"times of steps are positive, for numbers of rows from 1 on, got {self.decode_ms}")
        if self.positions < 0 or min(self.position_ms, self.prompt_ms) < 0.0 or self.prompt_rows < 1.0:
            raise ProfileError(f"a step has positions, prompt rows and what they add, got {self}")

    def step_ms(self, rows: int, positions: float) -> float:
        """A step without prompt rows.

        Args:
            positions: in the caches of all ``rows`` together.
        """
        numbers = [number for number, _ in self.decode_ms]
        last, last_ms = self.decode_ms[-1]
        if rows >= last:
            own_ms = last_ms * rows / last
        else:
            upper = bisect_left(numbers, rows)
            (low, low_ms), (high, high_ms) = self.decode_ms[max(0, upper - 1)], self.decode_ms[upper]
            own_ms = high_ms if low == high else low_ms + (high_ms - low_ms) * (rows - low) / (high - low)
        least_ms = self.decode_ms[0][1] / 2  # however short the caches are
        return max(least_ms, own_ms + self.position_ms * (positions - rows * self.positions))
