"""Reads bodies, plain or compressed, each up to a limit and for a limited time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.requests import Request

from skipkernels.server.http.encoding import Encoding
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.limits import RequestLimits

_CLOSE = {"connection": "close"}  # the rest of the body is not read
_SILENT_S = (
    1.0  # a body that sends nothing for so long may be given up; one that came at once may still wait to be read
)


class BodyReader:
    """Reads many bodies at a time. When they are too many or too large together, one that is not complete gives way
    to the others.

    Args:
        modalities: what the model takes; an error that tells how to send less names them.
    """

    def __init__(self, limits: RequestLimits, modalities: Collection[str] = ()) -> None:
        self._limits = limits
        self._modalities = modalities
        self._half_sent: dict[_HalfSent, None] = {}  # who has sent nothing for longest comes first
        self._bytes = 0

    async def read(self, request: Request) -> bytes:
        """
        Raises:
            HttpError: not JSON or in an encoding that is not read (415), too large as it comes or unpacked (413;
                before reading if its length is declared), too slow or given up for others (408), one too many (429),
                not what its encoding says (400).
            ClientDisconnect: the client has disconnected.
        """
        # browsers send other content types across origins without a preflight: any web page could use a local server
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HttpError(
                415, "unsupported_media_type", f"content-type must be application/json, got {kind or 'none'}"
            )
        encoding = Encoding(request.headers.get("content-encoding", ""))
        most = self._limits.max_body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > most:
            raise self._too_large()
        taken, body = 0, bytearray()
        timeout = asyncio.timeout(self._limits.client_timeout_s)
        reading = _HalfSent(timeout)
        try:
            async with timeout:
                self._begin(reading)
                async for piece in request.stream():
                    taken += len(piece)
                    body += await encoding.unpack(piece, most - len(body))
                    if max(taken, len(body)) > most:
                        raise self._too_large()
                    self._grow(reading, len(body))
        except TimeoutError:
            raise reading.late(self._limits.client_timeout_s) from None
        finally:
            self._end(reading)
        encoding.end()
        return bytes(body)

    def _begin(self, reading: _HalfSent) -> None:
        most = self._limits.max_half_sent
        if len(self._half_sent) == most:
            longest = next(iter(self._half_sent))
            if _now() - longest.heard < _SILENT_S:
                message = f"{most} bodies are being read, the maximum; try again later"
                raise HttpError(429, "too_many_requests", message, headers=_CLOSE)
            self._give_up(longest)
        self._half_sent[reading] = None

    def _grow(self, reading: _HalfSent, size: int) -> None:
        if reading.given_up:
            return
        self._end(reading)
        reading.size, reading.heard = size, _now()
        self._half_sent[reading] = None
        self._bytes += size
        if self._bytes > self._limits.max_half_sent_bytes:
            share = self._bytes / len(self._half_sent)
            self._give_up(next(other for other in self._half_sent if other.size >= share))

    def _end(self, reading: _HalfSent) -> None:
        if reading in self._half_sent:
            del self._half_sent[reading]
            self._bytes -= reading.size

    def _give_up(self, reading: _HalfSent) -> None:
        self._end(reading)
        reading.given_up = True
        reading.timeout.reschedule(_now())

    def _too_large(self) -> HttpError:
        media = [name for name, kind in (("images", "image"), ("recordings", "audio")) if kind in self._modalities]
        less = f"send fewer or smaller {' and '.join(media)}" if media else "send less text"
        return HttpError(413, "request_too_large", f"a request may have {self._limits.max_body_bytes:,} bytes; {less}")


class _HalfSent:
    """A body that is being read."""

    def __init__(self, timeout: asyncio.Timeout) -> None:
        self.timeout = timeout
        self.heard = _now()
        self.size = 0
        self.given_up = False

    def late(self, timeout_s: float) -> HttpError:
        if self.given_up:
            message = "other requests needed the room that this half-sent body took; send it again"
        else:
            message = f"the body did not arrive within {timeout_s:g} s"
        return HttpError(408, "request_timeout", message, headers=_CLOSE)


def _now() -> float:
    return asyncio.get_running_loop().time()
