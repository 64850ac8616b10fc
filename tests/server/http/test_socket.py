"""Bytes on a real socket, down to those that are no HTTP at all."""

import random
import socket
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from skipkernels.server.http.limits import RequestLimits
from tests.server.http.fakes import COMPLETIONS, EchoModel, body, echo_service
from tests.server.http.malformed import KEY, malformed
from tests.server.http.running import Running, running
from tests.server.http.test_fuzz import HEADERS, REFUSED

HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    limits = RequestLimits(max_requests=4, max_body_bytes=1 << 20, client_timeout_s=60.0)
    with running(echo_service(EchoModel(), api_key=KEY, strict=True, limits=limits)) as server:
        yield server
        with httpx.Client(base_url=server.url, headers=HEADERS) as client:
            assert client.post(COMPLETIONS, json=body()).status_code == 200


def answer(server: Running, data: bytes) -> bytes:
    """All that comes back for bytes with nothing after them."""
    received = b""
    with server.connect() as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(1 << 16):
                received += piece
        except OSError:  # closed before everything was sent
            pass
    return received


def status(received: bytes) -> int | None:
    return int(received.split(b" ")[1]) if received.startswith(b"HTTP/1.1 ") else None


def test_garbage_gets_a_400_or_a_closed_connection(server: Running) -> None:
    rng = random.Random(0)
    statuses: Counter[int | None] = Counter()
    for _ in range(300):
        data = rng.randbytes(rng.randint(1, 2000)) + rng.choice([b"", b"\r\n\r\n"])
        received = answer(server, data)
        statuses[status(received)] += 1
        assert status(received) in (None, 400), received[:200]
        assert received or b"\r\n\r\n" not in data, "a whole head was not answered"
    assert statuses[400] > 100


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /health\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",  # no host
        b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nA: \x00\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * (1 << 18) + b"\r\n\r\n",
        b"\r\n" * 100_000,
        HEAD.encode() + b"Content-Length: -5\r\n\r\n",
        HEAD.encode() + b"Content-Length: 5, 6\r\n\r\n",
        HEAD.encode() + b"Content-Length: 1e3\r\n\r\n",
        HEAD.encode() + b"Transfer-Encoding: rot13\r\n\r\n",
        HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        HEAD.encode() + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}\r\n",
        HEAD.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n{}",
    ],
)
def test_what_breaks_the_rules_of_http_gets_a_4xx(server: Running, data: bytes) -> None:
    received = answer(server, data)
    unanswered = len(data) > 1 << 16 and not received  # an answer is lost when the rest is still on its way
    assert unanswered or status(received) in (400, 404, 431, 501), received[:200]


def test_a_client_that_sends_half_a_body_and_leaves_gives_its_place_back(server: Running) -> None:
    """There are four places."""
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(HEAD.encode() + b'Content-Length: 1000\r\n\r\n{"model": ')
    with httpx.Client(base_url=server.url, headers=HEADERS) as client:
        until = time.monotonic() + 10
        while (code := client.post(COMPLETIONS, json=body()).status_code) == 429 and time.monotonic() < until:
            time.sleep(0.01)
    assert code == 200


def test_a_body_too_large_is_refused_while_it_is_sent(server: Running) -> None:
    with server.connect() as connection:
        connection.sendall(HEAD.encode() + b"Content-Length: 100000000\r\n\r\n")
        assert status(connection.recv(1 << 16)) == 413


def test_malformed_requests_on_a_real_socket(server: Running) -> None:
    with httpx.Client(base_url=server.url) as client:
        for seed in range(20_000, 20_300):
            request = malformed(seed)
            headers = {name: value.encode("latin-1") for name, value in (HEADERS | request.headers).items()}
            try:
                response = client.request(request.method, request.path, content=request.content, headers=headers)
            except httpx.WriteError:  # refused before all was sent
                continue
            if request.method == "OPTIONS" and response.status_code == 204:
                continue  # it says which methods there are
            assert response.status_code in REFUSED, f"seed {seed}, {request.kind}: {response.text[:300]}"


def test_an_idle_connection_outlives_the_clients_patience(server: Running) -> None:
    """httpx and openai keep one for 5 s. Were it closed here at that moment, what they just send would be lost."""
    with httpx.Client(base_url=server.url, limits=httpx.Limits(keepalive_expiry=60)) as client:
        sockets = []
        for pause_s in (0.0, 5.5):
            time.sleep(pause_s)
            response = client.get("/health")
            sockets.append(response.extensions["network_stream"].get_extra_info("client_addr"))
        assert sockets[0] == sockets[1], "the same connection"
