"""Measurements in the idle time of a model that is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from skipkernels.chat.progress import ChatInputs, SampledToken
from skipkernels.errors import SkipkernelsError
from skipkernels.modality.job import Request

T = TypeVar("T")
_PAUSE_S = 0.25  # a conversation that has just paused may go on


class Stopped(SkipkernelsError):
    """Nobody wants the measurements any more."""


class WhenIdle:
    """Runs measurements while nobody asks the model anything. One that a request comes into is given up at once, so
    that the request does not wait for it, and done again later.

    Args:
        busy: whether requests wait or run; called from any thread.
    """

    def __init__(self, busy: Callable[[], bool]) -> None:
        self._busy = busy
        self._disturbed = False
        self._stopped = threading.Event()

    # the progress of every request that is measured

    streamed = False

    @property
    def given_up(self) -> bool:
        self._disturbed = self._disturbed or self._stopped.is_set() or self._busy()
        return self._disturbed

    def restart(self) -> None:
        pass

    def add(self, text: str, logprobs: Sequence[SampledToken] = ()) -> None:
        pass

    def disturb(self) -> None:
        """The running measurement found the model in use: it is done again."""
        self._disturbed = True

    def watched(self, request: Request) -> Request:
        return replace(request, inputs=ChatInputs(request.inputs, self))

    def measure(self, measurement: Callable[[], T]) -> T:
        """The result of a measurement that nobody came into.

        Raises:
            Stopped: ``stop`` was called.
        """
        while True:
            self.wait()
            self._disturbed = False
            result = measurement()
            if not self.given_up:
                return result

    def wait(self) -> None:
        """Returns once nobody asks the model anything.

        Raises:
            Stopped: ``stop`` was called.
        """
        while self._busy() and not self._stopped.is_set():
            self.pause()
        if self._stopped.is_set():
            raise Stopped("the measurements were stopped")

    def pause(self) -> None:
        self._stopped.wait(_PAUSE_S)

    def stop(self) -> None:
        """Ends the measurements, the running one within a step."""
        self._stopped.set()
