"""Passages: pieces of known text for teacher-forced decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from skipkernels.errors import RequestError

if TYPE_CHECKING:
    from skipkernels.engine import Engine


@dataclass(frozen=True)
class Passage:
    """Token ids of a text: the first ``prompt_tokens`` are prefilled, the others are decoded with teacher forcing."""

    token_ids: tuple[int, ...]
    prompt_tokens: int

    @property
    def decoded_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens


def cut_passages(
    engine: Engine, texts: Sequence[str | Sequence[int]], count: int, prompt_tokens: int, new_tokens: int
) -> tuple[list[Passage], list[Passage]]:
    """Passages to search on and held-out passages, at most ``count`` in all, evenly spread over the texts.

    Each passage begins with the beginning-of-sequence token, if the tokenizer adds one.

    Raises:
        RequestError: the texts do not hold two passages.
    """
    length = prompt_tokens + new_tokens
    parts: tuple[list[Passage], list[Passage]] = ([], [])
    tokens = 0
    for text in texts:
        ids = engine.encode(text)
        bos = [engine.tokenizer.bos_token_id] if engine.tokenizer is not None else []
        prefix = ids[:1] if ids[:1] == bos else []
        body, size = ids[len(prefix) :], length - len(prefix)
        tokens += len(body)
        middle = len(body) // 2
        for part, half in zip(parts, (body[:middle], body[middle:]), strict=True):
            part += [
                Passage((*prefix, *half[start : start + size]), prompt_tokens)
                for start in range(0, len(half) - size + 1, size)
            ]
    if not all(parts):
        raise RequestError(
            f"the calibration text has {tokens} tokens; at least {2 * length} in one piece are needed: a passage of "
            f"{prompt_tokens} + {new_tokens} tokens to search on, and one to verify on"
        )
    search, held_out = (_spread(part, count // 2) for part in parts)
    return search, held_out


def _spread(passages: list[Passage], count: int) -> list[Passage]:
    picked = np.linspace(0, len(passages) - 1, min(len(passages), max(1, count))).round().astype(int)
    return [passages[index] for index in picked]
