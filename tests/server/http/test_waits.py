"""What clients wait for while they share a server, over HTTP: counted in steps where a step's length does not matter,
and in seconds on an engine whose steps take as long as a small model's."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.decoding.handle import Handle
from skipkernels.engine import Engine
from tests.models import random_prompt, tiny_engine, tiny_module
from tests.server.http.running import running
from tests.server.http.test_interface import real_service

STREAMS = 16
STEP_S = 0.02
LONG, AGAIN = 200, 1800


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    module = tiny_module(max_position_embeddings=2048)
    engine = tiny_engine(module=module, tokenizer=tokenizer, max_batch_size=STREAMS, max_seq_len=2048)
    engine.loop.weights_may_change = False  # nobody changes the module's, so prompts are kept, as those of a checkpoint
    return engine


@pytest.fixture
def url(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server whose steps take ``STEP_S``."""
    step = engine.loop.step

    def slow(wish: int | None = None) -> bool:
        time.sleep(STEP_S)
        return step(wish)

    monkeypatch.setattr(engine.loop, "step", slow)
    engine.loop.forget_prefixes()
    with running(real_service(engine)) as server:
        yield server.url


async def tokens(url: str, prompt: list[int], count: int) -> AsyncIterator[float]:
    """When each token came, in seconds from the request."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": count, "stream": True, "ignore_eos": True, "logprobs": 0}
    began = time.perf_counter()
    async with (
        httpx.AsyncClient(timeout=60, verify=False) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    for _ in (choice.get("logprobs") or {}).get("tokens", ()):
                        yield time.perf_counter() - began


async def stream(url: str, seed: int, count: int) -> list[float]:
    times = [at async for at in tokens(url, random_prompt(8, seed), count)]
    assert len(times) == count
    return times


def test_a_short_answer_behind_a_long_one_begins_within_two_steps_and_its_prompts(
    engine: Engine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that runs when it comes, and one more; eight tokens of a prompt are read in one."""
    count = 0
    came: dict[Handle, int] = {}
    began: dict[Handle, int] = {}
    step, submit = engine.loop.step, engine.submit

    def counted(wish: int | None = None) -> bool:
        nonlocal count
        count += 1
        more = step(wish)
        began.update({handle: count for handle in came if handle.token_ids and handle not in began})
        return more

    def noted(*args: Any, **options: Any) -> Handle:
        at = count
        handle = submit(*args, **options)
        came[handle] = at
        return handle

    monkeypatch.setattr(engine.loop, "step", counted)
    monkeypatch.setattr(engine, "submit", noted)

    async def ask() -> None:
        long = tokens(url, random_prompt(8, 1), LONG)
        await anext(long)
        rest = asyncio.create_task(_count(long))
        for seed in range(2, 6):
            assert len(await stream(url, seed, 4)) == 4
        assert not rest.done(), "the long answer is still being written"
        assert await rest == LONG - 1

    asyncio.run(ask())
    short = list(came)[1:]
    assert len(short) == 4
    assert max(began[handle] - came[handle] for handle in short) <= 2 + 1


async def _count(times: AsyncIterator[float]) -> int:
    return len([at async for at in times])


def test_sixteen_streams_share_steps_and_all_get_on(url: str) -> None:
    count = 30

    async def ask() -> tuple[float, float, list[list[float]]]:
        alone = await stream(url, 0, count)
        began = time.perf_counter()
        streams = await asyncio.gather(*(stream(url, seed, count) for seed in range(1, 1 + STREAMS)))
        return alone[-1], time.perf_counter() - began, streams

    alone_s, all_s, streams = asyncio.run(ask())
    assert STREAMS * count / all_s >= 3 * count / alone_s
    assert max(later - earlier for times in streams for earlier, later in pairwise(times)) < 1.0
    # nobody was served after the others: the last first token came before the first last one
    assert max(times[0] for times in streams) < min(times[-1] for times in streams)


def test_a_prompt_that_was_there_before_is_hardly_read_again(engine: Engine, url: str) -> None:
    prompt = random_prompt(AGAIN, 7)

    def read() -> float:
        figures = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#")
        found, asked = (float(figures[f"skipkernels:prefix_cache_{what}_total"]) for what in ("hits", "queries"))
        return asked - found

    async def ask(then: Callable[[], float]) -> tuple[float, float]:
        before = then()
        (first_s,) = [at async for at in tokens(url, prompt, 1)]
        return then() - before, first_s

    rows, first_s = asyncio.run(ask(read))
    rows_again, again_s = asyncio.run(ask(read))
    assert rows == AGAIN
    assert rows_again <= AGAIN / 20
    assert again_s < first_s
