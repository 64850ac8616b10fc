"""Turns: an engine's buffers serve one caller at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakMethod

import torch

from skipkernels.errors import DeviceError


class Turns:
    """``with turns.take():`` waits until no other thread is inside; the thread that is may enter again.

    Inside, torch is out of inference mode: what is made and changed there is of use outside, too. After a fork,
    the method ``on_fork`` is called in the child before its first turn.
    """

    def __init__(self, *, on_gpu: bool = False, on_fork: Callable[[], None] | None = None) -> None:
        self._on_gpu = on_gpu
        # Weak, for its object holds these turns: in a cycle, an engine would stay until the garbage collector runs.
        self._on_fork = on_fork and WeakMethod(on_fork)
        self._lock = threading.RLock()
        self._process = os.getpid()

    @contextmanager
    def take(self) -> Iterator[None]:
        self.check_process()
        with self._lock, torch.inference_mode(False), torch.no_grad():
            yield

    def check_process(self) -> None:
        """Notices a fork, before anything is done in the child."""
        if os.getpid() != self._process:
            self._arrive_in_child()

    def _arrive_in_child(self) -> None:
        """After a fork neither a thread that held the lock is here nor torch's, for which it would wait for ever."""
        if self._on_gpu:
            raise DeviceError("a GPU cannot be used in a forked process; load the engine there, or start it with spawn")
        torch.set_num_threads(1)
        self._lock = threading.RLock()
        self._process = os.getpid()
        if self._on_fork and (on_fork := self._on_fork()):
            on_fork()
