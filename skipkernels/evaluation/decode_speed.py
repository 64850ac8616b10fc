"""Decode speed of a method beside the full model's, in turns, so that quality and speed come from the same run."""

from __future__ import annotations

import time
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


class DecodeSpeed:
    """Decodes each prompt alone, once with the method and once with the full model, one right after the other.

    Methods that run on the reference path of whole layers, which is not made for speed, have no result.
    """

    name = "speed"
    metrics = (SPEED, SPEED_UP)

    def __init__(self, passages: Sequence[Passage], alike: Sequence[Passage], full: Method) -> None:
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
        work = Work()
        for number, prompt in enumerate(self._prompts):
            if not isinstance(method, EngineMethod):
                seconds = full_seconds = 0.0
            elif number % 2:  # who comes first changes, so that neither always finds the caches of the other
                full_seconds, _ = self._seconds(self._full, prompt)
                seconds, done = self._seconds(method, prompt)
                work += done
            else:
                seconds, done = self._seconds(method, prompt)
                full_seconds, _ = self._seconds(self._full, prompt)
                work += done
            tokens = self._new_tokens - 1 if seconds else 0
            items[SPEED.name].append((float(tokens), seconds))
            items[SPEED_UP.name].append((full_seconds, seconds))
            on_item(1)
        return Outcome(items, work)

    def _seconds(self, method: Method, prompt: Sequence[int]) -> tuple[float, Work]:
        """Of all tokens but the first, which comes out of the prompt."""
        started = time.perf_counter()
        method.generate([prompt], max_new_tokens=1, eos_token_ids=())
        first = time.perf_counter() - started
        started = time.perf_counter()
        (answer,) = method.generate([prompt], max_new_tokens=self._new_tokens, eos_token_ids=())
        return max(time.perf_counter() - started - first, 1e-9), answer.work
