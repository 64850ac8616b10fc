"""One client's connection. A client that takes nothing of what it is sent is cut off."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SEND_BYTES = 64 << 10
"""What the kernel is asked to buffer of an answer (Linux doubles it). By itself it buffers megabytes, and a client that
reads nothing has its whole answer computed before anyone notices."""


def connections(stall_s: float) -> type[asyncio.Protocol]:
    """
    Args:
        stall_s: a connection whose client takes nothing for so long is cut off.
    """

    class Connection(H11Protocol):
        _watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # nothing more is written before all is in the kernel's buffer

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._unwatch()
            self._look_later()

        def resume_writing(self) -> None:
            self._unwatch()
            super().resume_writing()

        def _look_later(self) -> None:
            self._watch = self.loop.call_later(stall_s, self._look, self._unsent())

        def _look(self, before: int) -> None:
            if self._unsent() < before:
                self._look_later()
            else:
                self.transport.abort()  # a close would wait for the client

        def _unwatch(self) -> None:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None

        def _unsent(self) -> int:
            assert isinstance(self.transport, asyncio.WriteTransport)
            return self.transport.get_write_buffer_size()

    return Connection
