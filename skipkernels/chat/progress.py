"""Passes text from a running model to the reader that waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from skipkernels.modality.strategy import Inputs


class Progress(Protocol):
    """What a running model reports and asks for one request. Called from the model's thread."""

    @property
    def given_up(self) -> bool:
        """Whether nobody waits for this answer any more; the model should then end it."""
        ...

    def restart(self) -> None:
        """The answer starts, or starts again after its worker was lost."""
        ...

    def add(self, text: str) -> None:
        """The next piece of the answer."""
        ...


class Unwatched:
    """The progress of a request that nobody watches."""

    given_up = False

    def restart(self) -> None:
        pass

    def add(self, text: str) -> None:
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

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._handed_on = ""
        self._position = 0
        self._differs = False
        self.given_up = False

    def restart(self) -> None:
        self._position = 0

    def add(self, text: str) -> None:
        known = self._handed_on[self._position : self._position + len(text)]
        fresh = text[len(known) :]
        self._differs = self._differs or not text.startswith(known)
        self._position += len(text)
        if fresh and not self._differs:
            self._handed_on += fresh
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, fresh)

    def end(self) -> None:
        """No more pieces will come. Called in the event loop."""
        self._pieces.put_nowait(None)

    async def next_piece(self) -> str | None:
        """The next piece; None once, after the last."""
        return await self._pieces.get()
