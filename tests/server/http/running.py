"""A server on a real socket, in a thread of its own."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from skipkernels.server.http.server import Server, listen
from skipkernels.server.http.service import Service


@dataclass
class Running:
    """``stop`` does what SIGTERM does, also the second time."""

    port: int
    server: Server
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.handle_exit(signal.SIGTERM, None)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextlib.contextmanager
def running(service: Service, *, grace_s: float = 20.0, **options: Any) -> Iterator[Running]:
    """``options``: more of ``Server``'s."""
    server = Server(service, grace_s=grace_s, **options)
    with listen() as listener:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            while not server.started:
                thread.join(0.01)
                assert thread.is_alive(), "the server did not start"
            yield Running(listener.getsockname()[1], server, thread)
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(60)
            assert not thread.is_alive(), "the server did not end"
