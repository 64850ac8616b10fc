"""Reads the request of one chat completion, waits for its answer, and writes it, whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from skipkernels.errors import SkipkernelsError
from skipkernels.server.http.conversion import ParsedRequest
from skipkernels.server.http.dialect import event
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.pending_request import PendingRequest
from skipkernels.server.http.service import Service

logger = logging.getLogger(__name__)

_DISCARD_S, _DISCARD_BYTES = 1.0, 1 << 20
_MOST_NAMED = 400  # characters of a header


class CompletionResponse(Response):
    """A response that is computed while it is sent. However it ends, its slot is freed and its job ends.

    Args:
        conversion: a method of ``Converter``.
    """

    def __init__(self, service: Service, conversion: Callable[[bytes], ParsedRequest]) -> None:
        super().__init__()
        self._service = service
        self._conversion = conversion

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reached = False
        try:
            self._service.check_slot()
            reached = True
            body = await self._service.bodies.read(Request(scope, receive))
            with self._service.request_slot():
                answering = asyncio.create_task(self._answer(body, send))
                await _while_connected(answering, receive)
        except ClientDisconnect:
            self._service.metrics.disconnected()
        except SkipkernelsError as error:
            if not reached:
                await _discard_body(receive)
            await self._refuse(self._service.error(error), send)

    async def _answer(self, body: bytes, send: Send) -> None:
        parsed = await self._service.convert(self._conversion, body)
        writer = _Writer(send, self._service.limits.client_timeout_s, parsed.ignored)
        async with self._service.submit(parsed) as pending:
            if parsed.stream:
                await self._stream(parsed, pending, writer)
            else:
                answer = await pending.answer()
                self._service.metrics.answered(answer)
                await writer.whole(200, parsed.dialect.whole(answer))

    async def _stream(self, parsed: ParsedRequest, pending: PendingRequest, writer: _Writer) -> None:
        """The HTTP status is sent with the first piece of text, so errors before it get their own status."""
        piece = await pending.next_piece()
        if piece is None:
            await pending.answer()  # raises if the job failed
        await writer.begin_events()
        await writer.events(parsed.dialect.begin())
        try:
            while piece is not None:
                await writer.events(parsed.dialect.piece(piece))
                piece = await pending.next_piece()
            answer = await pending.answer()
            documents = parsed.dialect.end(answer)
            self._service.metrics.answered(answer)
            await writer.events(documents)
        except SkipkernelsError as error:
            failure = self._service.error(error)
            self._service.metrics.failed(failure.status, failure.code)
            await writer.events([failure.document])
        await writer.end_events(parsed.dialect.last_event)

    async def _refuse(self, error: HttpError, send: Send) -> None:
        self._service.metrics.failed(error.status, error.code)
        if error.status >= 500:
            logger.warning("a request failed: %s", error)
        await _Writer(send, self._service.limits.client_timeout_s).whole(error.status, error.document, error.headers)


async def _discard_body(receive: Receive) -> None:
    """Takes what the client is sending, within limits: a connection that is closed with unread data is reset, and the
    client never sees why it was refused."""
    taken = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while taken < _DISCARD_BYTES:
                message = await receive()
                taken += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def _while_connected(answering: asyncio.Task[None], receive: Receive) -> None:
    """
    Raises:
        ClientDisconnect: the client disconnected before the answer; ``answering`` was cancelled.
    """
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise ClientDisconnect
        answering.result()
    finally:
        for task in (answering, leaving):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Writer:
    """Sends, with a timeout for clients that do not read."""

    def __init__(self, send: Send, timeout_s: float, ignored: Sequence[str] = ()) -> None:
        """``ignored``: fields of the request, for a header."""
        self._send_message = send
        self._timeout_s = timeout_s
        # their names are the client's, and a header is no place for whatever it sends
        named = ", ".join(re.sub(r"[^\w.-]", "?", name, flags=re.ASCII) for name in ignored)
        self._warning = [(b"x-skipkernels-ignored", named[:_MOST_NAMED].rstrip().encode())] if ignored else []

    async def whole(self, status: int, document: dict[str, Any], more: Mapping[str, str] | None = None) -> None:
        """``more``: headers."""
        body = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += self._warning + [(name.encode(), value.encode()) for name, value in (more or {}).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def begin_events(self) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers += self._warning
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def events(self, documents: Sequence[dict[str, Any]]) -> None:
        if documents:
            body = b"".join(map(event, documents))
            await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end_events(self, last: bytes) -> None:
        await self._send({"type": "http.response.body", "body": last})

    async def _send(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send_message(message)
        except (TimeoutError, OSError):
            raise ClientDisconnect from None
