"""Hundreds of clients at once, of whom many leave early: every request is answered, given up or refused, none lost."""

import asyncio
import random
import threading
from collections import Counter

import httpx
import pytest

from skipkernels.server.http.limits import RequestLimits
from skipkernels.server.http.service import Service
from tests.server.http.fakes import COMPLETIONS, EchoModel, body, echo_service
from tests.server.http.running import running

CLIENTS = 300
WORD_S = 0.002


async def behave(client: httpx.AsyncClient, number: int) -> str:
    """One client; returns what became of it. Each asks for something else, and must get that."""
    rng = random.Random(number)
    kind = rng.choice(["whole", "stream", "impatient", "leaves", "wrong", "stumble"])
    text = " ".join(f"{kind}{number}-{place}" for place in range(rng.randint(5, 30)))
    await asyncio.sleep(rng.random() * 0.5)
    if kind == "wrong":
        assert (await client.post(COMPLETIONS, json=body(5))).status_code == 400
    elif kind == "impatient":
        with pytest.raises(httpx.TimeoutException):
            await client.post(COMPLETIONS, json=body(text), timeout=rng.uniform(0.0001, 0.01))
    elif kind in ("whole", "stumble"):
        response = await client.post(COMPLETIONS, json=body(text))
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == text + " "
        assert response.json()["skipkernels"]["retried"] or kind == "whole"
    else:
        lines = []
        async with client.stream("POST", COMPLETIONS, json=body(text, stream=True)) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                lines.append(line)
                if kind == "leaves" and "content" in line and rng.random() < 0.5:
                    break
        assert kind == "leaves" or lines[-2:] == ["data: [DONE]", ""]
        assert kind == "leaves" or sum('"content":"stream' in line for line in lines) == len(text.split())
    return kind


async def settled(service: Service) -> None:
    """Waits until the backend has nothing to do."""
    for _ in range(500):
        status = await service.backend.status()
        counters = status.counters
        if counters.accepted == counters.answered + counters.failed and not status.waiting_requests:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{status} after 10 s without clients")


def test_no_request_is_lost_under_load() -> None:
    model = EchoModel(WORD_S)
    service = echo_service(model, limits=RequestLimits(max_requests=CLIENTS))
    threads = threading.active_count()

    async def load(url: str) -> Counter[str]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            kinds = Counter(await asyncio.gather(*(behave(client, number) for number in range(CLIENTS))))
            assert (await client.post(COMPLETIONS, json=body())).status_code == 200
        await settled(service)
        return kinds

    with running(service) as server:
        kinds = asyncio.run(load(server.url))
    counters = asyncio.run(service.backend.status()).counters
    answered = kinds["whole"] + kinds["stream"] + kinds["stumble"] + 1
    assert min(kinds.values()) > 25
    assert answered <= counters.answered <= answered + kinds["impatient"] + kinds["leaves"]
    assert counters.accepted == counters.answered + counters.failed
    assert counters.accepted + counters.refused <= CLIENTS + 1 - kinds["wrong"]
    assert counters.failed > 10  # those who left, before or in the middle of their answer
    assert counters.retried_requests >= kinds["stumble"]
    assert threading.active_count() == threads


def test_a_worker_does_not_work_for_clients_that_left() -> None:
    """Sixteen answers of a hundred words would take 10 s; whoever leaves after the first word frees the worker."""
    model = EchoModel(word_s=0.05)
    service = echo_service(model, limits=RequestLimits(max_requests=100))

    async def load(url: str) -> float:
        loop = asyncio.get_running_loop()
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:

            async def leave(number: int) -> None:
                text = " ".join(f"{number}-{place}" for place in range(100))
                async with client.stream("POST", COMPLETIONS, json=body(text, stream=True)) as response:
                    async for line in response.aiter_lines():
                        if f"{number}-0" in line:
                            return

            await asyncio.gather(*(leave(number) for number in range(16)))
            started = loop.time()
            assert (await client.post(COMPLETIONS, json=body())).status_code == 200
            return loop.time() - started

    with running(service) as server:
        assert asyncio.run(load(server.url)) < 5
    assert model.words < 16 * 20
