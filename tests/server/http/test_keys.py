"""Who has no key gets nothing but /health."""

import asyncio

import httpx
import pytest

from tests.server.http.fakes import COMPLETIONS, EchoModel, body, client_of, echo_service

KEY = "a key with ümlauts"


def statuses(authorization: bytes | None) -> tuple[list[int], EchoModel]:
    model = EchoModel()
    headers = {} if authorization is None else {b"authorization": authorization}

    async def exchange() -> list[int]:
        async with client_of(echo_service(model, api_key=KEY)) as client:
            responses = [
                await client.post(COMPLETIONS, json=body(), headers=httpx.Headers(headers)),
                await client.get("/v1/models", headers=httpx.Headers(headers)),
                await client.get("/metrics", headers=httpx.Headers(headers)),
                await client.get("/health"),
            ]
            return [response.status_code for response in responses]

    return asyncio.run(exchange()), model


@pytest.mark.parametrize("scheme", [b"Bearer ", b"bearer ", b"Bearer  "])
def test_the_key_opens_everything(scheme: bytes) -> None:
    assert statuses(scheme + KEY.encode())[0] == [200] * 4


@pytest.mark.parametrize(
    "authorization",
    [None, b"", b"Bearer", b"Bearer ", b"Bearer a key", KEY.encode(), b"Basic " + KEY.encode(), b"Bearer \xff\xfe"],
)
def test_without_it_nothing_is_read_and_nothing_runs(authorization: bytes | None) -> None:
    codes, model = statuses(authorization)
    assert codes == [401, 401, 401, 200]
    assert not model.batches


def test_a_body_of_a_stranger_is_not_read() -> None:
    async def exchange() -> httpx.Response:
        async def content():  # type: ignore[no-untyped-def]
            pytest.fail("it was read")
            yield b""

        async with client_of(echo_service(api_key=KEY)) as client:
            return await client.post(COMPLETIONS, content=content(), headers={"content-type": "application/json"})

    response = asyncio.run(exchange())
    assert response.json()["error"]["type"] == "authentication_error"
    assert KEY not in response.text
