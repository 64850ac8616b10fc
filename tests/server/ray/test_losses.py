"""Processes that are killed, clients that leave, servers that stop: on a cluster, too, no request is lost."""

import asyncio
import json
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from skipkernels.server.http.service import Service
from tests.server.http.fakes import COMPLETIONS, PROFILE, EchoFormat, body, client_of
from tests.server.ray.conftest import serve
from tests.server.ray.processes import replicas_of

if TYPE_CHECKING:
    from skipkernels.server.ray.backend import RayBackend

pytestmark = pytest.mark.slow
CLIENTS = 120
WORDS = 25


def words_of(number: int) -> str:
    return " ".join(f"{number}-{place}" for place in range(WORDS))


async def ask(client: httpx.AsyncClient, number: int, *, within_s: float) -> httpx.Response:
    """Every second one streams."""
    await asyncio.sleep(random.Random(number).random() * within_s)
    return await client.post(COMPLETIONS, json=body(words_of(number), stream=number % 2 == 0))


def check(number: int, response: httpx.Response) -> None:
    """It is the whole answer, each word once."""
    assert response.status_code == 200, response.text
    if number % 2:
        assert response.json()["choices"][0]["message"]["content"] == words_of(number) + " "
    else:
        chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
        said = [choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"]]
        assert "".join(said) == words_of(number) + " "


def test_requests_of_a_killed_replica_run_elsewhere(backend: "RayBackend") -> None:
    killed: list[int] = []

    async def kill_each_in_turn() -> None:
        for name in ("replica-0", "replica-1"):
            await asyncio.sleep(2.0)
            (process,) = replicas_of(name)
            os.kill(process, signal.SIGKILL)
            killed.append(process)
            while (await backend.status()).counters.retried_requests < len(killed):
                await asyncio.sleep(0.1)
            while replicas_of(name) in ([], [process]):
                await asyncio.sleep(0.1)

    async def exercise(client: httpx.AsyncClient) -> None:
        responses, _ = await asyncio.gather(
            asyncio.gather(*(ask(client, number, within_s=8.0) for number in range(CLIENTS))), kill_each_in_turn()
        )
        for number, response in enumerate(responses):
            check(number, response)
        status = await backend.status()
        assert status.counters.answered == status.counters.accepted == CLIENTS
        assert status.counters.retried_requests >= 2
        assert status.workers == 2
        retried = sum('"retried":true' in response.text for response in responses)
        assert retried == status.counters.retried_requests
        assert f"request_retries_total {retried}.0" in (await client.get("/metrics")).text
        assert len(killed) == 2

    serve(backend, exercise)


def test_a_killed_scheduler_fails_its_requests_and_comes_back(backend: "RayBackend") -> None:
    async def exercise(client: httpx.AsyncClient) -> None:
        asking = [asyncio.create_task(ask(client, number, within_s=0.1)) for number in range(20)]
        await asyncio.sleep(1.0)
        (process,) = replicas_of("scheduler")
        os.kill(process, signal.SIGKILL)
        for number, response in enumerate(await asyncio.gather(*asking)):
            if response.status_code == 200 and "worker_lost" not in response.text:
                check(number, response)
            else:
                assert number % 2 == 0 or response.status_code == 503
                assert "the scheduler's process and all requests it had accepted were lost" in response.text
        until = time.monotonic() + 60
        while (response := await client.post(COMPLETIONS, json=body())).status_code != 200:
            assert response.status_code == 503
            assert time.monotonic() < until
            await asyncio.sleep(0.5)

    serve(backend, exercise)


def test_a_replica_does_not_work_for_clients_that_left(backend: "RayBackend") -> None:
    """Their answers would take 60 s."""

    async def exercise(client: httpx.AsyncClient) -> None:
        async def leave(number: int) -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2.0):
                    await client.post(COMPLETIONS, json=body("word " * 3000, stream=number % 2 == 0))

        await asyncio.gather(*(leave(number) for number in range(6)))
        started = time.monotonic()
        check(1, await ask(client, 1, within_s=0.0))
        assert time.monotonic() - started < 20

    serve(backend, exercise)


def test_what_does_not_finish_before_the_shutdown_is_told_so(backend: "RayBackend") -> None:
    async def run() -> None:
        service = Service(PROFILE, EchoFormat(), backend)
        async with client_of(service) as client:
            client.timeout = httpx.Timeout(100)
            asking = [asyncio.create_task(ask(client, number, within_s=0.1)) for number in range(60)]
            await asyncio.sleep(1.0)
            await service.close(0.5)
            responses = await asyncio.gather(*asking)
        statuses = {response.status_code for response in responses}
        assert statuses == {200, 503}
        for number, response in enumerate(responses):
            if "service_closed" in response.text:
                assert "shut down" in response.text
            else:
                check(number, response)

    asyncio.run(run())
