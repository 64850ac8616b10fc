"""Decode speed of a method beside the full model's, in turns, so that quality and speed come from the same run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipkernels.calibration.passages import Passage
from skipkernels.evaluation.estimate import Item, Metric
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.engine_method import EngineMethod
from skipkernels.methods.method import Method, OnItem, ignore
from skipkernels.methods.work import Work

SPEED = Metric("decode speed", "tokens/s", higher_is_better=True)
SPEED_UP = Metric("speed-up", "ratio", higher_is_better=True)
_NO_RESULT: Item = (0.0, 0.0)


class DecodeSpeed:
    """Decodes each prompt alone, once with the method and once with the full model, one right after the other.

    Methods that run on the reference path of whole layers, which is not made for speed, have no result.
    """

    name = "speed"
    metrics = (SPEED, SPEED_UP)

    def __init__(self, passages: Sequence[Passage], alike: Sequence[Passage], full: EngineMethod) -> None:
        """The prompts are those of ``passages``; as many tokens are decoded as a passage has behind its prompt."""
        self._prompts = [passage.token_ids[: passage.prompt_tokens] for passage in passages]
        self._new_tokens = max(passage.decoded_tokens for passage in passages)
        self._full = full
        self.alike = alike

    @property
    def total(self) -> int:
        return len(self._prompts)

    @property
    def settings(self) -> dict[str, Any]:
        return {"prompts": self.total, "new_tokens": self._new_tokens}

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        items: dict[str, list[Item]] = {metric.name: [] for metric in self.metrics}
        if not isinstance(method, EngineMethod):
            on_item(self.total)
            return Outcome({name: [_NO_RESULT] * self.total for name in items}, Work())
        work = Work()
        for number, prompt in enumerate(self._prompts):
            pair = (method, self._full)[:: -1 if number % 2 else 1]  # who is first finds the caches of the other
            first, second = (each.decode_alone(prompt, self._new_tokens) for each in pair)
            (seconds, done), (full_seconds, _) = (second, first) if number % 2 else (first, second)
            items[SPEED.name].append((self._new_tokens - 1.0, seconds))
            items[SPEED_UP.name].append((full_seconds, seconds))
            work += done
            on_item(1)
        return Outcome(items, work)
