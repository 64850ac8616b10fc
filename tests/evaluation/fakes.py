"""Methods and tasks whose outcome is known beforehand."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from skipkernels.calibration.passages import Passage
from skipkernels.evaluation.estimate import Item, Metric
from skipkernels.evaluation.task import Outcome
from skipkernels.methods.method import Answer, Found, Method, OnItem, Progress, RatioOf, Reading, ignore
from skipkernels.methods.setup import Setup
from skipkernels.methods.work import Work

WORK = Work(tokens=10, ffns=40, ffns_skipped=10, layer_bytes=400, layer_bytes_skipped=60)


class FakeMethod:
    """Says what it is told to for each prompt, in order."""

    def __init__(self, texts: Sequence[str] | Callable[[Sequence[int]], str]) -> None:
        self._texts = texts
        self.prompts: list[list[int]] = []
        self.options: dict[str, Any] = {}

    def generate(self, prompts: Sequence[Sequence[int]], *, on_item: OnItem = ignore, **options: Any) -> list[Answer]:
        self.options = options
        answers = []
        for prompt in prompts:
            text = self._texts(prompt) if callable(self._texts) else self._texts[len(self.prompts)]
            self.prompts.append(list(prompt))
            answers.append(Answer(list(text.encode()), text, WORK))
            on_item(1)
        return answers

    def score(self, passages: Sequence[Passage], *, on_item: OnItem = ignore, **_: Any) -> list[Reading]:
        on_item(len(passages))
        return [
            Reading(np.zeros(p.decoded_tokens, np.int64), np.full(p.decoded_tokens, -1.0, np.float32), None, None, WORK)
            for p in passages
        ]


class FakeKind:
    """A kind of method that counts how often it is searched for and built."""

    name: ClassVar[str] = "fake"
    source: ClassVar[str] = "nowhere"
    ratio_of: ClassVar[RatioOf] = "FFN executions"

    def __init__(self) -> None:
        self.found: list[float] = []

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        self.found.append(ratio)
        progress("looking", 1.0)
        return {"ratio": ratio}

    def build(self, setup: Setup, found: Found) -> Method:
        return FakeMethod([])


class FakeFull(FakeKind):
    name: ClassVar[str] = "full"
    ratio_of: ClassVar[RatioOf] = "nothing"


SHARE = Metric("share right", "share", higher_is_better=True)


class FakeTask:
    """Four items, of which as many are right as ``right`` says for the label of a run."""

    name = "fake task"
    metrics = (SHARE,)
    total = 4
    alike: Sequence[Passage] = (Passage((1, 2, 3), 1),)

    def __init__(self, right: dict[str, int], settings: dict[str, Any] | None = None) -> None:
        self._right = right
        self.settings = settings or {"items": 4}
        self.labels: list[str] = []

    def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
        self.labels.append(label)
        on_item(self.total)
        right = self._right[label.partition("-")[0]]
        items: list[Item] = [(float(index < right), 1.0) for index in range(self.total)]
        return Outcome({SHARE.name: items}, WORK, groups=["a", "a", "b", "b"])
