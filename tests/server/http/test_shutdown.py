"""A server that is told to stop finishes what it has accepted, or says that it does not."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from tests.server.http.fakes import COMPLETIONS, EchoModel, body, echo_service
from tests.server.http.running import Running, running

WORDS = " ".join(f"word{place}" for place in range(20))


async def during_shutdown(
    server: Running, model: EchoModel, clients: int, times: int
) -> list[httpx.Response | Exception]:
    """Half of the clients stream. The server is stopped once the model runs and all clients were heard."""

    async def ask(client: httpx.AsyncClient, number: int) -> httpx.Response:
        return await client.post(COMPLETIONS, json=body(WORDS, stream=number % 2 == 0))

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        asking = [asyncio.create_task(ask(client, number)) for number in range(clients)]
        metrics = ""
        while f"jobs_accepted_total {clients}.0" not in metrics or not model.words:
            metrics = (await client.get("/metrics")).text
        for _ in range(times):
            server.stop()
        return await asyncio.gather(*asking, return_exceptions=True)


def stopped(clients: int, *, word_s: float, grace_s: float, times: int = 1) -> tuple[list[Any], EchoModel]:
    model = EchoModel(word_s)
    draining: list[int] = []
    with running(echo_service(model), grace_s=grace_s, on_draining=draining.append) as server:
        responses = asyncio.run(during_shutdown(server, model, clients, times))
        server.thread.join(60)
    assert draining == [clients], "it is said once how many are waited for"
    return responses, model


def test_what_was_accepted_is_answered() -> None:
    """Three batches of eight: two of them wait when the server is told to stop."""
    responses, model = stopped(20, word_s=0.01, grace_s=60)
    assert len(model.batches) >= 3
    for number, response in enumerate(responses):
        assert response.status_code == 200, response
        if number % 2:
            assert response.json()["choices"][0]["message"]["content"] == WORDS + " "
        else:
            assert response.text.endswith("data: [DONE]\n\n")
            assert response.text.count('"content":"word') == 20


@pytest.mark.parametrize(("grace_s", "times"), [(0.5, 1), (1000.0, 2)], ids=["grace is over", "told twice"])
def test_what_does_not_finish_in_time_is_told_so(grace_s: float, times: int) -> None:
    """An answer takes 10 s."""
    started = time.monotonic()
    responses, model = stopped(12, word_s=0.5, grace_s=grace_s, times=times)
    assert time.monotonic() - started < 8
    assert len(model.batches) == 1
    for number, response in enumerate(responses):
        if number % 2 == 0 and response.status_code == 200:  # its stream had begun
            *_, last, done, _ = response.text.split("\n\n")
            assert done == "data: [DONE]"
            error = json.loads(last.removeprefix("data: "))["error"]
        else:
            assert response.status_code == 503, response.text
            error = response.json()["error"]
        assert error["code"] == "service_closed"
        assert "shut down" in error["message"]


def test_a_client_that_does_not_read_holds_nobody_up_who_insists() -> None:
    """Its answer, 15 MB, does not fit what systems keep for it."""
    model = EchoModel()
    parts = [{"type": "text", "text": ("x" * 99_999 + " ") * 37} for _ in range(4)]
    content = json.dumps(body(parts, stream=True)).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with running(echo_service(model), grace_s=1000.0) as server, server.connect() as client:
        client.sendall(head.encode() + f"content-length: {len(content)}\r\n\r\n".encode() + content)
        while model.words < 4 * 37:
            time.sleep(0.01)
        server.stop()
        server.stop()
        server.thread.join(30)  # of the 60 s that clients have
        assert not server.thread.is_alive()


def test_a_stopped_server_takes_no_connections() -> None:
    draining: list[int] = []
    with running(echo_service(), on_draining=draining.append) as server:
        server.stop()
        server.thread.join(20)
        assert not draining, "nobody is waited for"
        with pytest.raises(ConnectionRefusedError):
            server.connect()
