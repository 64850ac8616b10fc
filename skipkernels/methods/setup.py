"""Setup: what all methods of one evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from skipkernels.calibration.passages import Passage, cut_passages
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.methods.layer_decoder import LayerDecoder


@dataclass
class Setup:
    """A model, text to find methods on, and what holds for every method.

    Args:
        engine: decodes the methods that skip FFNs, and lends its weights to those that skip layers.
        texts: text or token ids. Methods are found on the first half of each; the second is held out.
        prompt_tokens, new_tokens, passages: of the passages cut from the texts, as in ``calibrate``.
        warmup_tokens: generated tokens that run in full, at least 1: the first one is part of the prompt.
        seed: of everything that is drawn.
        memory: what was found before, by its description; plain JSON, so that it can be kept in a file.
    """

    engine: Engine
    texts: Sequence[str | Sequence[int]]
    prompt_tokens: int = 32
    new_tokens: int = 128
    passages: int = 32
    warmup_tokens: int = 1
    seed: int = 0
    memory: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.warmup_tokens < 1:
            raise RequestError(
                f"warmup_tokens must be at least 1, got {self.warmup_tokens}: the first token comes out of the prompt"
            )

    @cached_property
    def layer_decoder(self) -> LayerDecoder:
        """The reference path of the methods that skip whole layers."""
        return LayerDecoder(self.engine.config, self.engine.weights, self.engine.max_seq_len)

    @cached_property
    def text_passages(self) -> list[Passage]:
        """Passages of the texts to find methods on.

        Raises:
            RequestError: there is not enough text.
        """
        return cut_passages(self.engine, self.texts, self.passages, self.prompt_tokens, self.new_tokens)[0]

    def remember(self, what: str, find: Callable[[], Any]) -> Any:
        """What was found under this description, or else is found now; it must be plain JSON."""
        if what not in self.memory:
            self.memory[what] = find()
        return self.memory[what]
