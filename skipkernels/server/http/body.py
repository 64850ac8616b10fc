"""Reads a request's body, plain or compressed, up to a limit and for a limited time."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from skipkernels.server.http.encoding import Encoding
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.limits import RequestLimits


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """
    Raises:
        HttpError: not JSON or in an encoding that is not read (415), too large as it comes or unpacked (413; before
            reading if its length is declared), too slow (408), not what its encoding says (400).
        ClientDisconnect: the client has disconnected.
    """
    # browsers send other content types across origins without a preflight: any web page could use a local server
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpError(415, "unsupported_media_type", f"content-type must be application/json, got {kind or 'none'}")
    encoding = Encoding(request.headers.get("content-encoding", ""))
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_body_bytes:
        raise _too_large(limits)
    taken, body = 0, bytearray()
    try:
        async with asyncio.timeout(limits.client_timeout_s):
            async for piece in request.stream():
                taken += len(piece)
                body += await encoding.unpack(piece, limits.max_body_bytes - len(body))
                if max(taken, len(body)) > limits.max_body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise HttpError(
            408, "request_timeout", f"the body did not arrive within {limits.client_timeout_s:g} s"
        ) from None
    encoding.end()
    return bytes(body)


def _too_large(limits: RequestLimits) -> HttpError:
    return HttpError(
        413,
        "request_too_large",
        f"a request may have {limits.max_body_bytes:,} bytes; send fewer or smaller images and recordings",
    )
