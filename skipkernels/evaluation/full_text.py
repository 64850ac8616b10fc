"""FullText: what the full model writes, for others to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.methods.method import Method, Reading


class FullText:
    """The full model's greedy continuations of the prompts of passages, each as long as its passage, past the end of a
    document if it comes. Written when they are first needed, and kept."""

    def __init__(self, passages: Sequence[Passage], full: Method) -> None:
        self.prompts = [passage.token_ids[: passage.prompt_tokens] for passage in passages]
        self.new_tokens = max(passage.decoded_tokens for passage in passages)
        self._full = full

    @cached_property
    def passages(self) -> list[Passage]:
        """Prompts and continuations."""
        answers = self._full.generate(self.prompts, max_new_tokens=self.new_tokens, eos_token_ids=())
        return [
            Passage((*prompt, *answer.token_ids), len(prompt))
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]

    @cached_property
    def readings(self) -> list[Reading]:
        """The full model's predictions in its own text, all of them."""
        return self._full.score(self.passages, keep_log_probs=True)


class FullTextTask:
    """What tasks have in common that look at the full model's ``text``. ``alike`` is other text of the full model."""

    def __init__(self, text: FullText, alike: FullText) -> None:
        self._text = text
        self._alike = alike

    @property
    def alike(self) -> Sequence[Passage]:
        return self._alike.passages

    @property
    def total(self) -> int:
        return len(self._text.prompts)

    @property
    def settings(self) -> dict[str, Any]:
        return {"prompts": self.total, "new_tokens": self._text.new_tokens}
