"""What is asked of a generation and what comes back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from skipkernels.errors import RequestError

FinishReason = Literal["eos", "length", "stop"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy.

    Args:
        temperature: 0 is greedy; otherwise the logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens that holds this probability; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output.
        seed: key of the counter-based generator; the same seed gives the same tokens on every executor.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "a finite number of at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            (
                "repetition_penalty",
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                "a finite number above 0",
            ),
            ("seed", -(1 << 63) <= self.seed < 1 << 63, "a 64-bit integer"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise RequestError(f"{name} must be {expected}, got {getattr(self, name)}")


@dataclass
class Generation:
    """The answer to one prompt.

    ``skip_map[t, layer]`` says that the FFN of ``layer`` was skipped for generated token ``t``. ``similarity_map`` has
    the same shape: the cosine of the residual stream before and after each measured FFN, NaN elsewhere.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    skip_map: npt.NDArray[np.bool_]
    similarity_map: npt.NDArray[np.float32]
    time_to_first_token_s: float
    seconds_per_token: list[float] = field(repr=False)

    @property
    def skip_ratio(self) -> float:
        """Skipped FFN executions over (layers x generated tokens); warm-up and cold layers count."""
        return float(self.skip_map.mean()) if self.skip_map.size else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decode speed past the first token."""
        rest = self.seconds_per_token[1:]
        return len(rest) / sum(rest) if rest else 0.0


@dataclass(frozen=True)
class StreamChunk:
    """One token of a stream. ``text`` may be empty while a character or a possible stop string is incomplete;
    the last chunk carries the whole ``generation``."""

    text: str
    token_id: int | None
    generation: Generation | None = None
