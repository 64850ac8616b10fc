"""Token ids to text while they arrive: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 8
"""Tokens before the pending ones that are decoded with them: tokenizers treat a first token differently."""


class TextStream:
    """Turns one row's tokens into text.

    ``push`` returns the text that has become certain. Once ``stopped`` is set, a stop string was met; ``text`` ends
    before it and ``num_tokens`` counts the tokens up to the one that completed it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._token_ids: list[int] = []
        self._settled = 0  # tokens whose text is in _decoded
        self._decoded = ""
        self._emitted = 0
        self.stopped = False

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def text(self) -> str:
        return self._decoded

    def push(self, token_id: int) -> str:
        """Adds a token; returns newly certain text, possibly empty."""
        self._token_ids.append(token_id)
        pending = self._pending_text()
        if pending.endswith(_REPLACEMENT):
            return ""  # the bytes of a character are still incomplete
        self._settle(pending)
        held_back = 0 if self.stopped else self._stop_prefix_length()
        return self._emit(len(self._decoded) - held_back)

    def flush(self) -> str:
        """The rest, at the end of the generation."""
        if not self.stopped and self._settled < len(self._token_ids):
            self._settle(self._pending_text())
        return self._emit(len(self._decoded))

    def _pending_text(self) -> str:
        start = max(0, self._settled - _CONTEXT)
        settled = self._decode(self._token_ids[start : self._settled])
        return self._decode(self._token_ids[start:])[len(settled) :]

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def _settle(self, pending: str) -> None:
        searched = max(0, len(self._decoded) - max(map(len, self._stop), default=0))
        self._decoded += pending
        self._settled = len(self._token_ids)
        found = [at for stop in self._stop if (at := self._decoded.find(stop, searched)) >= 0]
        if found:
            self.stopped = True
            self._decoded = self._decoded[: min(found)]

    def _stop_prefix_length(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._decoded)), longest, -1):
                if self._decoded.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _emit(self, end: int) -> str:
        text = self._decoded[self._emitted : end]
        self._emitted = max(self._emitted, end)
        return text
