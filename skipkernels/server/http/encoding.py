"""Unpacks a compressed body as it arrives, and never more of it than a plain one may have."""

from __future__ import annotations

import asyncio
import zlib

from skipkernels.server.http.errors import HttpError

ACCEPTED = "gzip, deflate"
_PLAIN = ("", "identity")
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_MEMBERS = 8  # of gzip; thousands of empty ones would cost time
_AT_ONCE = 1 << 18  # bytes; then others have their turn


class Encoding:
    """How one body is encoded.

    Args:
        name: the header Content-Encoding.

    Raises:
        HttpError: it is none of those that are read (415).
    """

    def __init__(self, name: str) -> None:
        self._name = name.strip().lower()
        if self._name not in _PLAIN and self._name not in _WINDOWS:
            message = f"content-encoding {self._name[:40]} is not read; send the body as it is, or as one of {ACCEPTED}"
            raise HttpError(415, "unsupported_encoding", message, headers={"accept-encoding": ACCEPTED})
        self._unpacking = None if self._name in _PLAIN else zlib.decompressobj(_WINDOWS[self._name])
        self._members = 0

    async def unpack(self, piece: bytes, most: int) -> bytes:
        """What a piece of the body holds; of more than ``most`` bytes, so many and one.

        Raises:
            HttpError: it cannot be unpacked.
        """
        unpacking = self._unpacking
        if unpacking is None or not piece:
            return piece
        if self._members == 0:
            self._members = 1
            if self._name == "deflate" and piece[0] & 0xF != zlib.DEFLATED:
                # without zlib's header, as some clients send it; that header begins with the method
                unpacking = self._unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
        unpacked = bytearray()
        rest = piece
        while len(unpacked) <= most:
            if unpacking.eof and rest:
                if self._name == "deflate" or self._members == _MEMBERS:
                    raise self._refusal("goes on after its end")
                self._members += 1
                unpacking = self._unpacking = zlib.decompressobj(_WINDOWS[self._name])
            try:
                new = unpacking.decompress(rest, min(_AT_ONCE, most + 1 - len(unpacked)))
            except zlib.error as error:
                raise self._refusal(f"is no {self._name} data: {error}") from error
            unpacked += new
            rest = unpacking.unused_data if unpacking.eof else unpacking.unconsumed_tail
            if not (rest or new):
                break
            await asyncio.sleep(0)
        return bytes(unpacked)

    def end(self) -> None:
        """The whole body has been there.

        Raises:
            HttpError: something is missing.
        """
        if self._unpacking is not None and not self._unpacking.eof:
            raise self._refusal("ends early")

    def _refusal(self, what: str) -> HttpError:
        return HttpError(400, "invalid_request", f"the body is sent as {self._name}, and {what}")
