"""Clients that send or read slowly on a real socket take nothing from others."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from skipkernels.server.http.limits import RequestLimits
from tests.server.http.fakes import COMPLETIONS, EchoModel, body, echo_service
from tests.server.http.running import Running, running

HEAD = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
PLACES = 2
LIMITS = RequestLimits(max_requests=PLACES, max_body_bytes=10_000)


@pytest.fixture
def server() -> Iterator[Running]:
    with running(echo_service(limits=LIMITS)) as server:
        yield server


def half_sent(server: Running, stack: ExitStack, content: bytes) -> socket.socket:
    connection = stack.enter_context(server.connect())
    connection.sendall(f"{HEAD}Content-Length: {len(content) + 20}\r\n\r\n".encode() + content)
    return connection


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    while piece := connection.recv(1 << 16):
        received += piece
    return received


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return bool(connection.recv(1))
    except BlockingIOError:
        return True


def test_half_sent_bodies_take_no_place(server: Running) -> None:
    with ExitStack() as stack, httpx.Client(base_url=server.url) as client:
        waiting = [half_sent(server, stack, json.dumps(body()).encode()[:-20]) for _ in range(3 * PLACES)]
        for _ in range(5):
            assert client.post(COMPLETIONS, json=body()).status_code == 200
        assert all(map(is_open, waiting))
        waiting[0].setblocking(True)
        waiting[0].sendall(json.dumps(body()).encode()[-20:])
        assert waiting[0].recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_of_too_many_half_sent_bodies_the_one_that_waits_longest_is_closed(server: Running) -> None:
    with ExitStack() as stack, httpx.Client(base_url=server.url) as client:
        waiting = [half_sent(server, stack, b"{") for _ in range(LIMITS.max_half_sent)]
        time.sleep(0.2)  # until the server has read them
        assert client.post(COMPLETIONS, json=body()).status_code == 429, "they may still be coming"
        time.sleep(1.0)
        assert client.post(COMPLETIONS, json=body()).status_code == 200
        received = until_closed(waiting[0])
        assert received.startswith(b"HTTP/1.1 408")
        assert b"needed the room" in received
        assert all(map(is_open, waiting[1:]))


def test_half_sent_bodies_together_hold_a_limited_number_of_bytes(server: Running) -> None:
    small, large = b" ", b" " * (LIMITS.max_body_bytes - 20)
    limits = RequestLimits(max_requests=100, max_body_bytes=LIMITS.max_body_bytes)
    with running(echo_service(limits=limits)) as server, ExitStack() as stack:
        first = half_sent(server, stack, small)  # to close it would free nothing
        waiting = [half_sent(server, stack, large) for _ in range(33)]
        assert until_closed(waiting[0]).startswith(b"HTTP/1.1 408")
        assert all(map(is_open, [first, *waiting[1:]]))


@pytest.mark.parametrize(("stream", "words"), [(True, 2000), (False, 20)])
def test_a_client_that_takes_nothing_stops_costing(stream: bool, words: int) -> None:
    """Its 2 MB would fit what a kernel buffers by itself, so that the server would never notice."""
    model = EchoModel(word_s=0.001)
    service = echo_service(model, limits=RequestLimits(client_timeout_s=0.1))
    text = " ".join(["x" * (2_000_000 // words)] * words)
    with running(service) as server, socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        reader.connect(("127.0.0.1", server.port))
        content = json.dumps(body(text, stream=stream, max_tokens=words)).encode()
        reader.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        until = time.monotonic() + 20
        while model.words < 10 or service.requests or len(server.server.server_state.connections):
            assert time.monotonic() < until, (model.words, service.requests)
            time.sleep(0.02)
        assert not stream or model.words < words / 4, "its row went on"
        with httpx.Client(base_url=server.url) as client:
            assert client.post(COMPLETIONS, json=body()).status_code == 200
