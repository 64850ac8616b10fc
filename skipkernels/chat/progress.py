"""From a model that is still running to whoever waits for its text."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from skipkernels.modality.strategy import Inputs


class Progress(Protocol):
    """What a model may tell while it runs, and ask. Called from the model's thread."""

    @property
    def given_up(self) -> bool:
        """Nobody waits for this answer any more: the model may end it as soon as it can."""
        ...

    def restart(self) -> None:
        """The answer begins, or begins again after its first worker was lost."""
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
    """Where to report how one request of a batch gets on."""
    return inputs.progress if isinstance(inputs, ChatInputs) else Unwatched()


class LiveProgress:
    """Hands the pieces to the event loop that it was made in.

    An answer that begins again repeats what its reader has: the reader gets only what is new, and nothing more when
    the repetition differs, which the whole answer shows at the end.
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
