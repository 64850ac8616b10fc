"""Setup: what all methods of one evaluation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from skipkernels.calibration.neuron_profile import NeuronProfile, profile_neurons
from skipkernels.calibration.passages import Passage, cut_passages
from skipkernels.calibration.tuning import Decoder
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.methods.layer_decoder import LayerDecoder


@dataclass
class Setup:
    """A model, calibration text, and the settings of all methods.

    Args:
        engine: runs the methods that skip FFNs; those that skip layers use its weights.
        texts: text or token ids. Parameters are searched on the first half of each; the second half is held out.
        prompt_tokens, new_tokens, passages: of the passages cut from the texts, as in ``calibrate``.
        warmup_tokens: first generated tokens, which skip nothing; at least 1, because the first never skips.
        seed: of all random draws.
        memory: cache of search results, by description; plain JSON, so that it can be kept in a file.
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
                f"warmup_tokens must be at least 1, got {self.warmup_tokens}: the first token never skips"
            )

    @cached_property
    def layer_decoder(self) -> LayerDecoder:
        """The reference path of the methods that skip whole layers."""
        return LayerDecoder(self.engine.config, self.engine.weights, self.engine.max_seq_len)

    @cached_property
    def text_passages(self) -> list[Passage]:
        """Passages of the texts to search on.

        Raises:
            RequestError: there is not enough text.
        """
        return cut_passages(self.engine, self.texts, self.passages, self.prompt_tokens, self.new_tokens)[0]

    @cached_property
    def neuron_profile(self) -> NeuronProfile:
        """What leaving out neurons and blocks costs on ``text_passages``."""
        return profile_neurons(self.engine, self.text_passages)

    @cached_property
    def decoder(self) -> Decoder:
        """Decodes ``text_passages`` under one policy after the other, beside the dense model."""
        return Decoder(self.engine, self.text_passages, lambda tokens: None)

    def remember(self, what: str, find: Callable[[], Any]) -> Any:
        """The cached result of this description, or that of ``find``; plain JSON."""
        if what not in self.memory:
            self.memory[what] = find()
        return self.memory[what]
