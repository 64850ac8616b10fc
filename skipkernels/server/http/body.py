"""Reads a request's body, up to a limit and for a limited time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.limits import RequestLimits


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """
    Raises:
        HttpError: not JSON (415), too large (413; before reading if its length is declared), too slow (408).
        ClientDisconnect: the client has disconnected.
    """
    # browsers send other content types across origins without a preflight: any web page could use a local server
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "unsupported_media_type", f"content-type must be application/json, got {kind or 'none'}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise HttpError(415, "unsupported_encoding", f"content-encoding {encoding[:40]} is not read; send it as it is")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_body_bytes:
        raise _too_large(limits)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.client_timeout_s):
            async for piece in request.stream():
                if len(body) + len(piece) > limits.max_body_bytes:
                    raise _too_large(limits)
                body += piece
    except TimeoutError:
        raise HttpError(
            408, "request_timeout", f"the body did not arrive within {limits.client_timeout_s:g} s"
        ) from None
    return bytes(body)


def _too_large(limits: RequestLimits) -> HttpError:
    return HttpError(
        413,
        "request_too_large",
        f"a request may have {limits.max_body_bytes:,} bytes; send fewer or smaller images and recordings",
    )
