"""Runs the application in uvicorn, with a shutdown that loses no accepted request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from skipkernels.errors import SkipkernelsError
from skipkernels.server.http.app import create_app
from skipkernels.server.http.connection import SEND_BYTES, connections
from skipkernels.server.http.service import Service

LOOPBACK = "127.0.0.1"
_TICK_S = 0.1  # polling interval for signals, as uvicorn's
_BACKLOG = 2048  # as uvicorn's
_KEEP_ALIVE_S = 20
"""Longer than clients keep idle connections (httpx and openai 5 s, aiohttp 15 s): the client must close first, or a
request that it is just sending is lost."""
_FLUSH_S = 2.0  # for the last answers to be sent


class Server(uvicorn.Server):
    """Serves until a signal. Then it accepts no more connections and requests, and ends when every accepted request is
    answered. Requests that are not answered within ``grace_s``, or before a second signal, get an error.

    Args:
        on_started: called when connections are accepted.
        on_draining: called with the number of requests that the shutdown waits for, if there are any.
    """

    def __init__(
        self,
        service: Service,
        *,
        grace_s: float,
        on_started: Callable[[], None] = lambda: None,
        on_draining: Callable[[int], None] = lambda requests: None,
    ) -> None:
        self._service = service
        self._grace_s = grace_s
        self._on_started = on_started
        self._on_draining = on_draining
        self._stop_now = False
        config = uvicorn.Config(
            create_app(service),
            # explicit, because "auto" depends on what else is installed
            loop="asyncio",
            http=connections(service.limits.client_timeout_s),
            ws="none",
            lifespan="on",
            log_level="error",  # at lower levels, every malformed request writes a line
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            server_header=False,
            proxy_headers=False,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """For SIGINT and SIGTERM. uvicorn's own handler would raise them again at the end."""
        self._stop_now = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._service.requests:
            self._on_draining(self._service.requests)
        closing = asyncio.create_task(self._service.close(self._grace_s))
        stopping = asyncio.create_task(super().shutdown(sockets))
        while not (closing.done() or self._stop_now):
            await asyncio.wait([closing], timeout=_TICK_S)
        if self._stop_now:
            self._service.end_grace()
            await closing
            await asyncio.wait([stopping], timeout=_FLUSH_S)
            self.force_exit = True  # do not wait for clients that do not read their answers
        await closing
        await stopping


def listen(host: str = LOOPBACK, port: int = 0) -> socket.socket:
    """Binds a socket to serve on; port 0: a free one.

    Raises:
        SkipkernelsError: the address is in use or not available.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sets TCP_NODELAY only if the protocol is given; without it, tokens are delayed by 40 ms
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # accepted connections inherit it
        listener.bind(address)
        listener.listen(_BACKLOG)  # at once: a second server on the same port is refused here, before it loads a model
    except OSError as error:
        raise SkipkernelsError(f"cannot listen on {host}, port {port}: {error.strerror}; choose another") from error
    return listener


def serve(
    service: Service,
    listener: socket.socket,
    *,
    grace_s: float,
    on_started: Callable[[], None] = lambda: None,
    on_draining: Callable[[int], None] = lambda requests: None,
) -> None:
    """Serves until SIGTERM or SIGINT; see ``Server``."""
    server = Server(service, grace_s=grace_s, on_started=on_started, on_draining=on_draining)
    asyncio.run(server.serve(sockets=[listener]))
