"""What the tasks that ask questions share: which are asked, and a prompt with its answer as tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from skipkernels.calibration.passages import Passage
from skipkernels.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skipkernels.engine import Engine

T = TypeVar("T")
_OTHERS = 64


def split(items: Sequence[T], limit: int | None, seed: int, task: str = "facts") -> tuple[list[T], list[T]]:
    """Draws items to ask, at most ``limit``, and others to set the ratio on.

    Raises:
        RequestError: there are fewer than two.
    """
    if len(items) < 2:
        raise RequestError(f"the task {task!r} needs at least 2 {task}, got {len(items)}")
    drawn = random.Random(seed).sample(list(items), len(items))
    others = min(_OTHERS, len(items) // 2)
    return drawn[others:][:limit], drawn[:others]


def tokenizer_of(engine: Engine, task: str) -> PreTrainedTokenizerBase:
    """
    Raises:
        RequestError: the model has none.
    """
    if engine.tokenizer is None:
        raise RequestError(f"the task {task!r} needs a tokenizer, and this model was loaded without one")
    return engine.tokenizer


def answered(engine: Engine, prompt: str, answer: str, task: str) -> Passage:
    """The tokens of ``prompt``, then those of ``answer``, as a model would write them.

    Raises:
        RequestError: see ``tokenizer_of``.
    """
    tokenizer, tokens = tokenizer_of(engine, task), engine.encode(prompt)
    return Passage((*tokens, *tokenizer(answer, add_special_tokens=False)["input_ids"]), len(tokens))
