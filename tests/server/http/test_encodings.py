"""A compressed body is read piece by piece, up to the size that a plain one may have."""

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from skipkernels.server.http.limits import RequestLimits
from tests.server.http.fakes import COMPLETIONS, EchoModel, body, client_of, echo_service

PLAIN = json.dumps(body("one two three")).encode()
PACKED = gzip.compress(PLAIN, mtime=0)
PACKERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("GZIP", gzip.compress),
    ("gzip", lambda text: gzip.compress(text[:9]) + gzip.compress(b"") + gzip.compress(text[9:])),
    ("deflate", zlib.compress),
    ("deflate", lambda text: zlib.compress(text, wbits=-zlib.MAX_WBITS)),
    ("identity", bytes),
    ("", bytes),
]


def post(content: bytes, encoding: str, limits: RequestLimits | None = None, piece: int = 1000) -> httpx.Response:
    async def pieces() -> AsyncIterator[bytes]:
        for first in range(0, len(content), piece):
            yield content[first : first + piece]

    async def exchange() -> httpx.Response:
        async with client_of(echo_service(EchoModel(), limits)) as client:
            headers = {"content-type": "application/json", "content-encoding": encoding}
            return await client.post(COMPLETIONS, content=pieces(), headers=headers)

    return asyncio.run(exchange())


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_compressed_body_is_read(encoding: str, pack: Callable[[bytes], bytes], piece: int) -> None:
    response = post(pack(PLAIN), encoding, piece=piece)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "one two three "


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_what_is_too_large_unpacked_is_never_unpacked_whole(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    """64 MB in 64 kB; 1 MB may be had."""
    bomb = pack(b" " * (64 << 20))
    assert len(bomb) < 1 << 19
    tracemalloc.start()
    response = post(bomb, encoding, RequestLimits(max_body_bytes=1 << 20), piece=1 << 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert peak < 8 << 20


@pytest.mark.parametrize("spare", [0, -1])
def test_the_limit_is_that_of_a_plain_body(spare: int) -> None:
    plain = json.dumps(body("one two three " * 100)).encode()
    limits = RequestLimits(max_body_bytes=len(plain) + spare)
    for content, encoding in ((gzip.compress(plain), "gzip"), (plain, "identity")):
        assert post(content, encoding, limits).status_code == (413 if spare else 200)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (PLAIN, "is no gzip data"),
        (b"", "ends early"),
        (PACKED[:-4], "ends early"),
        (PACKED[:-8] + b"\0" * 8, "is no gzip data"),
        (b"".join(map(gzip.compress, [PLAIN, *[b""] * 8])), "goes on after its end"),
        (PACKED + b"xy", "is no gzip data"),
        (PACKED + PACKED[:-4], "ends early"),
    ],
    ids=["plain", "nothing", "cut off", "wrong sum", "nine members", "and more", "a second one cut off"],
)
@pytest.mark.parametrize("piece", [1, 1000])
def test_what_cannot_be_unpacked_is_said_to_be_so(content: bytes, part: str, piece: int) -> None:
    response = post(content, "gzip", piece=piece)
    assert response.status_code == 400
    assert part in response.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "nonsense"])
def test_other_encodings_are_refused_with_those_that_are_read(encoding: str) -> None:
    async def exchange() -> None:
        async with client_of(echo_service()) as client:
            for path in (COMPLETIONS, "/tokenize"):
                headers = {"content-type": "application/json", "content-encoding": encoding}
                response = await client.post(path, content=PLAIN, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_encoding")
                assert response.headers["accept-encoding"] == "gzip, deflate"
                assert "gzip, deflate" in response.json()["error"]["message"]

    asyncio.run(exchange())
