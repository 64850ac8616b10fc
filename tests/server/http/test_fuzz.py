"""Thousands of requests that are wrong: each gets a 4xx, and the server goes on as if nothing had happened."""

import asyncio
from collections import Counter

import httpx
import pytest

from skipkernels.server.http.limits import RequestLimits
from tests.server.http.fakes import COMPLETIONS, EchoModel, body, client_of, echo_service
from tests.server.http.malformed import KEY, malformed

HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
REFUSED = {400, 401, 404, 405, 413, 415}  # 429 is not among them: places have to be given back


async def send(client: httpx.AsyncClient, seed: int) -> int:
    request = malformed(seed)
    headers = {name: value.encode("latin-1") for name, value in (HEADERS | request.headers).items()}
    response = await client.request(request.method, request.path, content=request.content, headers=headers)
    if request.method == "OPTIONS" and response.status_code == 204:
        return 405  # it says which methods there are
    assert response.status_code in REFUSED, f"seed {seed}, {request.kind}: {response.status_code} {response.text[:300]}"
    if request.method != "HEAD":
        error = response.json()["error"]
        assert error["message"], f"seed {seed}, {request.kind}: {response.text[:300]}"
        assert len(error["message"]) < 2000, f"seed {seed}, {request.kind}: what was sent is not sent back"
    return response.status_code


async def fuzz(seeds: range) -> Counter[int]:
    model = EchoModel()
    limits = RequestLimits(max_requests=1, max_body_bytes=1 << 20)
    service = echo_service(model, api_key=KEY, strict=True, limits=limits)
    async with client_of(service) as client:
        statuses = Counter([await send(client, seed) for seed in seeds])
        assert not model.batches, "a malformed request reached the model"
        assert (await client.post(COMPLETIONS, json=body(), headers=HEADERS)).status_code == 200
    return statuses


def test_a_thousand_malformed_requests() -> None:
    statuses = asyncio.run(fuzz(range(1000)))
    assert set(statuses) == REFUSED  # all ways to refuse are exercised


@pytest.mark.slow
def test_ten_thousand_malformed_requests() -> None:
    assert asyncio.run(fuzz(range(10_000, 20_000))).total() == 10_000
