"""Five times as many clients as there are places; and who has left, or reads nothing, costs nothing."""

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from skipkernels.engine import Engine
from skipkernels.server.http.app import create_app
from skipkernels.server.http.limits import RequestLimits
from tests.server.http.running import running
from tests.server.http.test_interface import engine, real_service  # noqa: F401  # a fixture
from tests.server.http.test_load import settled

PLACES = 40
TOKENS = 180  # of an answer that nobody waits for


def asked(number: int, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": f"the quick brown fox {number % 97}", "max_tokens": 4} | fields


async def behave(client: httpx.AsyncClient, number: int) -> str:
    """One client; returns what became of it."""
    kind = random.Random(number).choice(["whole", "hurried", "stream", "leaves"])
    if kind in ("whole", "hurried"):
        wish = {"deadline_ms": 20.0} if kind == "hurried" else {}
        response = await client.post("/v1/completions", json=asked(number, **wish))
        if response.status_code == 429:
            return "refused"
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["usage"]["completion_tokens"] == 4
        assert answer["skipkernels"]["deadline_met"] or wish
        return "answered" if answer["skipkernels"]["deadline_met"] else "late by its wish"
    body = asked(number, stream=True, max_tokens=4 if kind == "stream" else TOKENS)
    last = ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 429:
            return "refused"
        async for line in response.aiter_lines():
            if kind == "leaves" and '"text"' in line:
                return "left"
            last = line or last
    assert last == "data: [DONE]"
    return "answered"


@pytest.mark.parametrize("requests", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_five_times_as_many_clients_as_places(engine: Engine, requests: int) -> None:  # noqa: F811
    """Each request is answered, refused, or late by its own wish; nobody's connection breaks, and memory stays flat."""
    service = real_service(engine, limits=RequestLimits(max_requests=PLACES))
    memory: list[int] = []

    async def load(url: str) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        numbers = iter(range(requests))

        async def keep_asking() -> None:
            # each with a client of its own: httpx looks at every connection of a client before every request
            async with httpx.AsyncClient(base_url=url, timeout=120, verify=False) as client:
                for number in numbers:
                    outcomes[await behave(client, number)] += 1
                    if sum(outcomes.values()) % (requests // 10) == 0:
                        memory.append(psutil.Process().memory_info().rss)
                    if outcomes["refused"]:
                        await asyncio.sleep(0.01)

        await asyncio.gather(*(keep_asking() for _ in range(5 * PLACES)))
        await settled(service)
        cache = (await service.backend.status()).cache
        assert cache is not None
        assert cache.used == 0, "no row is left behind"
        return outcomes

    with running(service) as server:
        outcomes = asyncio.run(load(server.url))
    assert sum(outcomes.values()) == requests
    assert min(outcomes[kind] for kind in ("answered", "refused", "left")) > requests // 100
    assert memory[-1] < memory[1] + (32 << 20), [rss >> 20 for rss in memory]


@pytest.mark.parametrize("how", ["leaves", "reads nothing"])
def test_who_leaves_stops_costing_within_two_steps(
    engine: Engine,  # noqa: F811
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted are the tokens that its row got after it had left; one who reads nothing is taken to have left."""
    service = real_service(engine, limits=RequestLimits(client_timeout_s=0.2))
    left_at: list[int] = []
    handles: list[Any] = []
    submit = engine.submit

    def noted(*args: Any, **options: Any) -> Any:
        handles.append(submit(*args, **options))
        return handles[-1]

    def as_slow_as_a_model(wish: int | None = None, step: Callable[[int | None], bool] = engine.loop.step) -> bool:
        time.sleep(0.01)
        return step(wish)

    monkeypatch.setattr(engine, "submit", noted)
    monkeypatch.setattr(engine.loop, "step", as_slow_as_a_model)

    async def leave() -> None:
        app = create_app(service)
        body = json.dumps(asked(0, stream=True, max_tokens=TOKENS)).encode()
        requested, gone, texts = [False], asyncio.Event(), 0

        async def receive() -> dict[str, Any]:
            if not requested[0]:
                requested[0] = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            left_at.append(len(handles[0].token_ids))
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            nonlocal texts
            texts += b'"text"' in message.get("body", b"")
            if texts == 3 and how == "leaves":
                gone.set()
            elif texts == 3:
                await asyncio.sleep(60)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
        }
        async with service:
            await app(scope, receive, send)
            if how == "reads nothing":
                left_at.append(len(handles[0].token_ids))
            await settled(service)

    asyncio.run(leave())
    assert handles[0].token_ids, "it had begun"
    assert len(handles[0].token_ids) - left_at[0] <= 2 + 1, "the step that runs when it leaves, and one more"
    assert len(handles[0].token_ids) < TOKENS
