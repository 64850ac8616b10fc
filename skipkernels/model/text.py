"""Token ids to text while they arrive: whole characters only, and never past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 6
"""Tokens at least that are decoded with the pending ones: tokenizers treat a first token differently."""


class TextStream:
    """Turns one row's tokens into text.

    ``push`` returns the text that has become certain. Once ``stopped`` is set, a stop string was met; ``text`` ends
    before it and ``num_tokens`` counts the tokens up to the one that completed it. After ``flush``, ``text`` is what
    the tokenizer makes of all tokens. Special tokens are no part of the text, but a stop string may name them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._special = _special_tokens_in(self._stop, tokenizer)
        self._token_ids: list[int] = []
        self._settled = 0  # tokens whose text is certain
        self._start = 0  # where the window that is decoded begins: between two characters
        self._window = ""  # the text of the window's settled tokens
        self._next_start = 0  # where the next window may begin
        self._decoded = ""  # certain text, with the special tokens that stop strings name
        self._hidden: list[tuple[int, int]] = []  # where these stand in it
        self._emitted = 0  # characters of it that were given out
        self._whole: str | None = None  # the text, once all of it was decoded
        self.stopped = False

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def text(self) -> str:
        return self._visible(0, len(self._decoded)) if self._whole is None else self._whole

    def push(self, token_id: int) -> str:
        """Adds a token; returns newly certain text, possibly empty."""
        self._token_ids.append(token_id)
        if token_id in self._special:
            self._hidden.append((len(self._decoded), len(self._decoded) + len(self._special[token_id])))
            self._append(self._special[token_id])
        window = self._decode(self._start)
        if not window.endswith(_REPLACEMENT):  # else the bytes of a character are still incomplete
            self._settle(window)
        held_back = 0 if self.stopped else self._stop_prefix_length()
        return self._emit(len(self._decoded) - held_back)

    def flush(self) -> str:
        """The rest, at the end of the generation."""
        if not self.stopped and self._settled < len(self._token_ids):
            self._settle(self._decode(self._start))
        if not self.stopped:
            self._whole = self._decode(0)
        return self._emit(len(self._decoded))

    def _decode(self, start: int) -> str:
        return str(self._tokenizer.decode(self._token_ids[start:], skip_special_tokens=True))

    def _settle(self, window: str) -> None:
        """Takes over the text of the window, whose last token ends a character."""
        if not window.startswith(self._window):
            # a byte that fits nowhere spoils the whole run of byte tokens it stands in; what was given out of that run
            # cannot be taken back, so the text goes on behind it
            self._start, self._window = self._settled, ""
            window = self._decode(self._start)
        self._append(window[len(self._window) :])
        self._window, self._settled = window, len(self._token_ids)
        if self._settled - max(self._start, self._next_start) >= _CONTEXT:
            self._move_window()

    def _move_window(self) -> None:
        """Leaves old tokens behind, so that a token's cost does not grow with the text.

        A window must begin between two characters and hold a word: its first one may lose the space in front of it.
        """
        if self._next_start > self._start:
            text = self._decode(self._next_start)
            if text.strip() and _REPLACEMENT not in text and self._window.endswith(text):
                self._start, self._window = self._next_start, text
        self._next_start = self._settled

    def _append(self, text: str) -> None:
        searched = max(0, len(self._decoded) - max(map(len, self._stop), default=0))
        self._decoded += text
        found = [at for stop in self._stop if (at := self._decoded.find(stop, searched)) >= 0]
        if found and not self.stopped:
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
        text = self._visible(self._emitted, end)
        self._emitted = max(self._emitted, end)
        return text

    def _visible(self, start: int, end: int) -> str:
        """A part of the text, without special tokens."""
        text = ""
        for hidden_start, hidden_end in self._hidden:
            text += self._decoded[start : min(hidden_start, end)]
            start = max(start, hidden_end)
        return text + self._decoded[start:end]


def _special_tokens_in(stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens, which decoded text leaves out, that a stop string names."""
    if not stop:
        return {}
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added
    return {index: token for index, token in named.items() if token and any(token in text for text in stop)}
