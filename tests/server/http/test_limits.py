"""A server holds no more than it said it would, and reads no more than it has to."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from PIL import Image as PillowImage

from skipkernels.server.http.app import create_app
from skipkernels.server.http.limits import RequestLimits
from tests.server.http.fakes import COMPLETIONS, EchoFormat, EchoModel, body, client_of, echo_service
from tests.server.http.media import image_part, text_part

JSON = {"content-type": "application/json"}


class Upload:
    """A body of 1,000-byte pieces, counted as they are taken."""

    def __init__(self, pieces: int, pause_s: float = 0.0) -> None:
        self.pieces = pieces
        self.taken = 0
        self._pause_s = pause_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self.pieces):
            self.taken += 1
            yield b" " * 1000
            await asyncio.sleep(self._pause_s)


def upload(content: Upload, headers: dict[str, str], **limits: Any) -> httpx.Response:
    async def exchange() -> httpx.Response:
        async with client_of(echo_service(limits=RequestLimits(**limits))) as client:
            return await client.post(COMPLETIONS, content=content, headers=JSON | headers)

    return asyncio.run(exchange())


def test_a_body_that_says_it_is_too_large_is_not_read() -> None:
    content = Upload(1000)
    response = upload(content, {"content-length": "1000000"}, max_body_bytes=10_000)
    assert (response.status_code, content.taken) == (413, 0)
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize("headers", [{}, {"content-length": "10"}, {"content-length": "a lot"}])
def test_a_body_that_turns_out_too_large_is_not_read_further(headers: dict[str, str]) -> None:
    content = Upload(1000)
    response = upload(content, headers, max_body_bytes=10_000)
    assert (response.status_code, content.taken) == (413, 11)


def test_a_body_of_the_largest_size_is_read() -> None:
    content = Upload(10)
    assert upload(content, {}, max_body_bytes=10_000).status_code == 400  # white space is no request
    assert content.taken == 10


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    response = upload(Upload(100, pause_s=0.05), {}, client_timeout_s=0.2)
    assert (response.status_code, response.json()["error"]["code"]) == (408, "request_timeout")


@pytest.mark.parametrize(
    ("modalities", "advice"),
    [
        (("text",), "send less text"),
        (("text", "image"), "send fewer or smaller images"),
        (("text", "image", "audio"), "send fewer or smaller images and recordings"),
    ],
)
def test_what_is_too_large_is_told_what_to_send_less_of(
    modalities: tuple[str, ...], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EchoFormat, "modalities", modalities)
    response = upload(Upload(1), {}, max_body_bytes=10)
    assert response.json()["error"]["message"].endswith(f"; {advice}")


@pytest.mark.parametrize(("parts", "status"), [(6, 200), (7, 413)])
def test_pictures_of_all_messages_count_and_texts_do_not(parts: int, status: int) -> None:
    file = io.BytesIO()
    PillowImage.new("RGB", (2, 2)).save(file, "PNG")
    messages = [
        *({"role": "system", "content": "plain text"} for _ in range(70)),
        {"role": "user", "content": [text_part(), *([image_part(file.getvalue())] * parts)]},
    ]

    async def exchange() -> httpx.Response:
        async with client_of(echo_service(limits=RequestLimits(max_parts=6))) as client:
            return await client.post(COMPLETIONS, json=body(messages=messages))

    assert asyncio.run(exchange()).status_code == status


def test_more_messages_than_could_ever_pass_are_not_built() -> None:
    async def exchange() -> httpx.Response:
        async with client_of(echo_service()) as client:
            return await client.post(COMPLETIONS, json=body(messages=[{"role": "user", "content": ""}] * 5000))

    response = asyncio.run(exchange())
    assert response.status_code == 400
    assert "at most 1024" in response.json()["error"]["message"]


def test_no_more_requests_are_held_than_allowed() -> None:
    async def exchange() -> tuple[list[int], int]:
        service = echo_service(EchoModel(word_s=0.05), limits=RequestLimits(max_requests=3))
        async with client_of(service) as client:
            first = await asyncio.gather(*(client.post(COMPLETIONS, json=body()) for _ in range(8)))
            later = await client.post(COMPLETIONS, json=body())
            return sorted(response.status_code for response in first), later.status_code

    statuses, later = asyncio.run(exchange())
    assert statuses == [200] * 3 + [429] * 5
    assert later == 200


def test_a_client_that_reads_nothing_is_given_up() -> None:
    """Its answer waits in ``send``, as behind a full socket."""
    model = EchoModel(word_s=0.01)
    service = echo_service(model, limits=RequestLimits(client_timeout_s=0.2))
    content = json.dumps(body(" ".join(["word"] * 500), stream=True)).encode()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        await asyncio.sleep(60 if len(sent) == 3 else 0)

    async def exchange() -> None:
        requests = iter([{"type": "http.request", "body": content}])

        async def receive() -> Any:
            return next(requests, None) or await asyncio.sleep(60)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}
        async with service:
            await asyncio.wait_for(create_app(service)(scope, receive, send), 10)

    asyncio.run(exchange())
    assert len(sent) == 3
    assert model.words < 100  # the model was told that nobody listens
    assert b"request_disconnected_total 1.0" in service.metrics.render(asyncio.run(service.backend.status()))


@pytest.mark.parametrize("field", ["max_body_bytes", "max_requests", "max_audio_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_limit_is_positive(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must be positive"):
        RequestLimits(**{field: value})
