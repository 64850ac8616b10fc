"""uvicorn, with a shutdown in which no accepted request is lost."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from skipkernels.serving.http.app import create_app
from skipkernels.serving.http.service import Service

LOOPBACK = "127.0.0.1"


class Server(uvicorn.Server):
    """Serves until SIGTERM or SIGINT. Then it takes no more connections and requests, and ends when every accepted
    request is answered; those that are not within ``grace_s`` are answered with an error."""

    def __init__(self, service: Service, *, host: str = LOOPBACK, port: int = 8000, grace_s: float = 30.0) -> None:
        self._service = service
        self._grace_s = grace_s
        config = uvicorn.Config(
            create_app(service),
            host=host,
            port=port,
            # named, because "auto" takes whatever else is installed
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.create_task(self._service.close(self._grace_s))
        await super().shutdown(sockets)
        await closing
