"""Passes text from a running model to the reader that waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from skipkernels.decoding.generation import TokenLogprob
from skipkernels.modality.strategy import Inputs

SampledToken = tuple[int, TokenLogprob]


@dataclass(frozen=True)
class Piece:
    """New text of an answer, which is number ``index`` of its job's."""

    index: int
    text: str
    logprobs: tuple[SampledToken, ...] = ()


class Progress(Protocol):
    """What a running model reports and asks for one request. Called from the model's thread."""

    @property
    def streamed(self) -> bool:
        """Whether somebody reads the pieces as they come; else they need not be sent from process to process."""
        ...

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for this answer any more; the model should then end it."""
        ...

    def restart(self) -> None:
        """The answer starts, or starts again after its worker was lost."""
        ...

    def add(self, text: str, logprobs: Sequence[SampledToken] = ()) -> None:
        """The next piece of the answer; the tokens it ends with, where their log probabilities were asked."""
        ...


class Unwatched:
    """The progress of a request that nobody watches."""

    streamed = given_up = False

    def restart(self) -> None:
        pass

    def add(self, text: str, logprobs: Sequence[SampledToken] = ()) -> None:
        pass


class ChatInputs(dict[str, Any]):
    """Inputs by modality name, as every model takes them, and the ``progress`` of the request they belong to."""

    def __init__(self, inputs: Mapping[str, Any], progress: Progress) -> None:
        super().__init__(inputs)
        self.progress = progress


def progress_of(inputs: Inputs) -> Progress:
    """The progress to report to for one request of a batch."""
    return inputs.progress if isinstance(inputs, ChatInputs) else Unwatched()


class LiveProgress:
    """Passes the pieces to the event loop that it was created in.

    A restarted answer repeats text that the reader already has; only text after that is passed on. If the repetition
    differs, nothing more is passed on: the reader finds out when it compares with the whole answer.
    """

    def __init__(
        self, pieces: asyncio.Queue[Piece | None] | None = None, index: int = 0, *, streamed: bool = True
    ) -> None:
        """``pieces``: where to put them, None: into a queue of its own; not ``streamed``: nowhere."""
        self.streamed = streamed
        self._loop = asyncio.get_running_loop()
        self._pieces = asyncio.Queue[Piece | None]() if pieces is None else pieces
        self._index = index
        self._handed_on = ""
        self._position = 0
        self._tokens_handed_on = 0
        self._tokens = 0
        self._differs = False
        self.given_up = False

    def restart(self) -> None:
        self._position = self._tokens = 0

    def add(self, text: str, logprobs: Sequence[SampledToken] = ()) -> None:
        if not self.streamed:
            return
        known = self._handed_on[self._position : self._position + len(text)]
        fresh = text[len(known) :]
        self._differs = self._differs or not text.startswith(known)
        self._position += len(text)
        new_tokens = tuple(logprobs[max(0, self._tokens_handed_on - self._tokens) :])
        self._tokens += len(logprobs)
        if (fresh or new_tokens) and not self._differs:
            self._handed_on += fresh
            self._tokens_handed_on += len(new_tokens)
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, Piece(self._index, fresh, new_tokens))

    def end(self) -> None:
        """No more pieces will come. Called in the event loop."""
        self._pieces.put_nowait(None)

    async def next_piece(self) -> Piece | None:
        """The next piece; None once, after the last."""
        return await self._pieces.get()
