"""uvicorn, with a shutdown in which no accepted request is lost."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from skipkernels.errors import SkipkernelsError
from skipkernels.server.http.app import create_app
from skipkernels.server.http.service import Service

LOOPBACK = "127.0.0.1"
_TICK_S = 0.1  # between two looks at whether a signal came, as uvicorn does
_LAST_WORDS_S = 2.0


class Server(uvicorn.Server):
    """Serves until it is told to stop. Then it takes no more connections and requests, and ends when every accepted
    request is answered; those that are not within ``grace_s``, or when it is told once more, are answered with an
    error.

    Args:
        on_started: called when connections are taken.
    """

    def __init__(self, service: Service, *, grace_s: float, on_started: Callable[[], None] = lambda: None) -> None:
        self._service = service
        self._grace_s = grace_s
        self._on_started = on_started
        self._stop_now = False
        config = uvicorn.Config(
            create_app(service),
            # named, because "auto" takes whatever else is installed
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_level="error",  # below, every client that sends garbage writes a line
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """For SIGINT and SIGTERM alike. uvicorn's own would raise them again at the end."""
        self._stop_now = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._service.close(self._grace_s))
        stopping = asyncio.create_task(super().shutdown(sockets))
        while not (closing.done() or self._stop_now):
            await asyncio.wait([closing], timeout=_TICK_S)
        if self._stop_now:
            self._service.end_grace()
            await closing
            await asyncio.wait([stopping], timeout=_LAST_WORDS_S)
            self.force_exit = True  # clients that do not read their answers are not waited for
        await closing
        await stopping


def listen(host: str = LOOPBACK, port: int = 0) -> socket.socket:
    """A socket to serve on; port 0 takes a free one.

    Raises:
        SkipkernelsError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # only where the protocol is named does asyncio send small pieces at once; else tokens would wait 40 ms
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise SkipkernelsError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another") from error
    return listener


def serve(
    service: Service, listener: socket.socket, *, grace_s: float, on_started: Callable[[], None] = lambda: None
) -> None:
    """Serves until SIGTERM or SIGINT; see ``Server``."""
    asyncio.run(Server(service, grace_s=grace_s, on_started=on_started).serve(sockets=[listener]))
