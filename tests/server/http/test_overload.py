"""Who has left, or reads nothing, costs nothing."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from skipkernels.engine import Engine
from skipkernels.server.http.app import create_app
from skipkernels.server.http.limits import RequestLimits
from tests.server.http.test_interface import engine, real_service  # noqa: F401  # a fixture
from tests.server.http.test_load import settled

TOKENS = 180  # of an answer that nobody waits for


def asked(number: int, **fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": f"the quick brown fox {number % 97}", "max_tokens": 4} | fields


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
