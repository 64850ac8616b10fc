"""Lengths: number of tokens of the generations for which a ratio should hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError


@dataclass(frozen=True)
class Lengths:
    """Generated tokens of each generation, the first one included. The warm-up takes a larger share of short answers,
    and the lengths are needed to make up for that."""

    counts: tuple[int, ...]

    @classmethod
    def of(cls, passages: Sequence[Passage]) -> Lengths:
        return cls(tuple(passage.decoded_tokens for passage in passages))

    @property
    def longest(self) -> int:
        return max(self.counts)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """The index within its generation of every token of all generations."""
        return np.concatenate([np.arange(count) for count in self.counts])

    @property
    def label(self) -> str:
        if len(set(self.counts)) == 1:
            return f"{self.longest} tokens"
        return f"{min(self.counts)} to {self.longest} tokens, {np.mean(self.counts):.1f} on average"

    def share_past(self, ratio: float, warmup_tokens: int) -> float:
        """The ratio that tokens after the warm-up have to skip, so that all tokens together skip ``ratio``.

        Raises:
            PolicyError: it is more than 1.
        """
        reachable = float((self.steps >= warmup_tokens).mean())
        if not 0.0 < ratio <= reachable:
            raise PolicyError(
                f"a ratio of {ratio} cannot be reached: with {warmup_tokens} warm-up tokens, generations of "
                f"{self.label} skip at most {reachable:.3f}"
            )
        return ratio / reachable
