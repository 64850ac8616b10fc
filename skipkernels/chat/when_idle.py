"""Measurements in the idle time of a model that is in use."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from skipkernels.chat.progress import ChatInputs, SampledToken
from skipkernels.errors import SkipkernelsError
from skipkernels.modality.job import Request

T = TypeVar("T")
_PAUSE_S = 0.1
QUIET_S = 1.0
"""How long after a request measuring begins: a conversation that has just paused may go on."""


class Stopped(SkipkernelsError):
    """Nobody wants the measurements any more."""


class WhenIdle:
    """Runs measurements while nobody asks the model anything. One that a request comes into is given up at once, so
    that the request does not wait for it, and done again later.

    Args:
        busy: whether requests wait or run; called from any thread.
        quiet_s: see ``QUIET_S``.
        clock: in seconds.
    """

    def __init__(
        self, busy: Callable[[], bool], quiet_s: float = QUIET_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._busy = busy
        self._quiet_s = quiet_s
        self._clock = clock
        self._seen_busy = -float("inf")
        self._disturbed = False
        self._stopped = threading.Event()

    # the progress of every request that is measured

    streamed = False

    @property
    def given_up(self) -> bool:
        self._disturbed = self._disturbed or self.wanted
        return self._disturbed

    @property
    def wanted(self) -> bool:
        """Whether what is measured has to make room now."""
        if self._busy():
            self._seen_busy = self._clock()
            return True
        return self._stopped.is_set()

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
        """Returns once nobody has asked the model anything for a while.

        Raises:
            Stopped: ``stop`` was called.
        """
        while not self._stopped.is_set() and (self.wanted or self._clock() < self._seen_busy + self._quiet_s):
            self.pause()
        if self._stopped.is_set():
            raise Stopped("the measurements were stopped")

    def pause(self) -> None:
        self._stopped.wait(_PAUSE_S)

    def stop(self) -> None:
        """Ends the measurements, the running one within a step."""
        self._stopped.set()
