"""Setup: what all methods of one evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.passages import Passage, cut_passages
from skipkernels.quality.layer_decoder import LayerDecoder

_PASSAGES = (16, 128)  # fewest and most: shorter passages are more, but each costs a prefill


@dataclass
class Setup:
    """A model, text to find methods on, and what holds for every method.

    Args:
        engine: decodes the methods that skip FFNs, and lends its weights to those that skip layers.
        texts: text or token ids. Methods are found on the first half of each; the second is held out.
        prompt_tokens: tokens of each calibration passage that are prefilled.
        warmup_tokens: generated tokens that run in full, at least 1: the first one is part of the prompt.
        calibration_tokens: decoded tokens to find methods on, as far as whole passages allow.
        seed: of everything that is drawn.
    """

    engine: Engine
    texts: Sequence[str | Sequence[int]]
    prompt_tokens: int = 32
    warmup_tokens: int = 1
    calibration_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.warmup_tokens < 1:
            raise RequestError(
                f"warmup_tokens must be at least 1, got {self.warmup_tokens}: the first token comes out of the prompt"
            )

    @cached_property
    def layer_decoder(self) -> LayerDecoder:
        """The reference path of the methods that skip whole layers."""
        return LayerDecoder(self.engine.config, self.engine.weights, self.engine.max_seq_len)

    def passage_count(self, new_tokens: int) -> int:
        """How many passages of ``new_tokens`` decoded tokens to calibrate on, the held-out half included."""
        fewest, most = _PASSAGES
        return max(fewest, min(most, self.calibration_tokens // new_tokens))

    def search_passages(self, new_tokens: int) -> list[Passage]:
        """Passages to find methods on.

        Raises:
            RequestError: there is not enough text.
        """
        search, _ = cut_passages(
            self.engine, self.texts, self.passage_count(new_tokens), self.prompt_tokens, new_tokens
        )
        return search
