"""Loads that users bring, over HTTP, in turns with llama.cpp's server on the same file: many streams at once, a short
answer behind a long one, a stream beside a long prompt, a prompt that was there before.

    python bench/serving_loads.py MODEL.gguf --llama-server PATH --threads 2 --options "--dtype bf16"
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

STREAMS, STREAM_TOKENS = 16, 48
LONG_ANSWER, SHORT_ANSWER = 150, 8
LONG_PROMPT_WORDS = 1100  # some 1,700 tokens
_TOPICS = ("rivers", "engines", "bread", "stars", "glass", "music", "bridges", "salt", "maps", "wool", "ships", "ice")


@dataclass
class Stream:
    """When its tokens came, in seconds from its request."""

    times: list[float] = field(default_factory=list)

    @property
    def first(self) -> float:
        return self.times[0]

    @property
    def longest_gap(self) -> float:
        return max((later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)), default=0.0)


@dataclass(frozen=True)
class Server:
    """One that runs."""

    name: str
    url: str

    async def stream(self, client: httpx.AsyncClient, prompt: str, tokens: int, **more: Any) -> Stream:
        """Asks for ``tokens`` greedy tokens after ``prompt``."""
        asked = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True} | more
        stream, started = Stream(), time.perf_counter()
        async with client.stream("POST", f"{self.url}/v1/completions", json=asked) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{self.name}: {await response.aread()!r}")
            async for line in response.aiter_lines():
                if line.startswith("data: {") and any(c.get("text") for c in json.loads(line[6:]).get("choices", ())):
                    stream.times.append(time.perf_counter() - started)
        return stream


def tale(number: int) -> str:
    return f"The history of {_TOPICS[number % len(_TOPICS)]}, part {number + 1}: In the beginning, people"


def long_prompt(seed: int, ending: str) -> str:
    words = (f"{_TOPICS[(seed + at * at) % len(_TOPICS)]} {(seed * 7919 + at * 31) % 997}" for at in range(1, 551))
    return " ".join(words) + f"\n{ending}"


async def many_streams(server: Server, client: httpx.AsyncClient, seed: int, more: dict[str, Any]) -> dict[str, float]:
    alone = await server.stream(client, tale(1000 * seed + 500), STREAM_TOKENS, **more)
    started = time.perf_counter()
    streams = await asyncio.gather(
        *(server.stream(client, tale(1000 * seed + at), STREAM_TOKENS, **more) for at in range(STREAMS))
    )
    took = time.perf_counter() - started
    firsts = sorted(stream.first for stream in streams)
    one, all_of_them = len(alone.times) / alone.times[-1], sum(len(stream.times) for stream in streams) / took
    return {
        "one stream, tokens/s": one,
        f"{STREAMS} streams, tokens/s": all_of_them,
        "times one": all_of_them / one,
        "first token, median s": statistics.median(firsts),
        "first token, p99 s": firsts[-1],
        "longest gap s": max(stream.longest_gap for stream in streams),
    }


async def behind_a_long_answer(
    server: Server, client: httpx.AsyncClient, seed: int, more: dict[str, Any]
) -> dict[str, float]:
    alone = await server.stream(client, tale(1000 * seed + 501), SHORT_ANSWER, **more)
    long = asyncio.create_task(server.stream(client, tale(1000 * seed + 502), LONG_ANSWER, **more))
    await asyncio.sleep(0.3)
    short = await server.stream(client, tale(1000 * seed + 503), SHORT_ANSWER, **more)
    await long
    return {"short answer alone s": alone.times[-1], "behind a long one s": short.times[-1]}


async def beside_a_long_prompt(
    server: Server, client: httpx.AsyncClient, seed: int, more: dict[str, Any]
) -> dict[str, float]:
    stream = asyncio.create_task(server.stream(client, tale(1000 * seed + 504), LONG_ANSWER, **more))
    await asyncio.sleep(0.3)
    prompt = await server.stream(client, long_prompt(seed, "Question one:"), 4, **more)
    beside = await stream
    again = await server.stream(client, long_prompt(seed, "Another question:"), 4, **more)
    return {
        "long prompt, first token s": prompt.first,
        "a stream's longest gap beside it s": beside.longest_gap,
        "the prompt again, first token s": again.first,
    }


LOADS: tuple[Callable[..., Awaitable[dict[str, float]]], ...] = (
    many_streams,
    behind_a_long_answer,
    beside_a_long_prompt,
)


async def measure(server: Server, seed: int, more: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=2 * STREAMS)) as client:
        for load in LOADS:
            new = await load(server, client, seed, more)
            print(server.name, {what: round(value, 3) for what, value in new.items()}, flush=True)  # if it is cut off
            found |= new
    return found


@contextmanager
def running(name: str, command: list[str], port: int) -> Iterator[Server]:
    """The server of a command, once it is healthy; it ends with the block."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            server = Server(name, f"http://127.0.0.1:{port}")
            for _ in range(600):
                if process.poll() is not None:
                    said.seek(0)
                    raise RuntimeError(f"{name} ended: {said.read()[-2000:].decode(errors='replace')}")
                try:
                    if httpx.get(f"{server.url}/health", timeout=1).status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.1)
            yield server
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main(
    model: Path,
    llama_server: Annotated[Path | None, typer.Option(help="llama.cpp's, built from its sources.")] = None,
    threads: int = 2,
    rounds: Annotated[int, typer.Option(help="In turns.")] = 2,
    options: Annotated[str, typer.Option(help="More words for `skipkernels serve`.")] = "--skip-levels 0",
    skip_level: Annotated[float | None, typer.Option(help="What requests to us ask for.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    """Starts the servers one after the other in every round, so that neither has the machine beside the other."""
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        port = free_port()
        ours = [sys.executable, "-c", "from skipkernels.cli import main; main()", "serve", str(model)]
        ours += ["--port", str(port), "--threads", str(threads), "--max-batch-size", str(STREAMS)]
        ours += ["--served-model-name", "m", *shlex.split(options)]
        commands = [("skipkernels", ours, {} if skip_level is None else {"skip_level": skip_level})]
        if llama_server is not None:
            theirs = [str(llama_server), "-m", str(model), "--port", str(port), "-t", str(threads), "-np", "8"]
            commands.append(("llama.cpp", [*theirs, "-c", "32768", "--no-webui"], {}))
        for name, command, more in commands if number % 2 == 0 else commands[::-1]:
            with running(name, command, port) as server:
                asyncio.run(measure_warm(server, number, more, found.setdefault(name, [])))
    table = Table("", *found)
    for what in next(iter(found.values()))[0]:
        cells = [[one[what] for one in results] for results in found.values()]
        table.add_row(what, *(f"{statistics.median(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in cells))
    Console(width=120).print(table)
    if out is not None:
        about = {"model": model.name, "threads": threads, "options": options, "processors": os.cpu_count()}
        out.write_text(json.dumps(about | {"rounds": found}, indent=2) + "\n")


async def measure_warm(server: Server, seed: int, more: dict[str, Any], results: list[dict[str, float]]) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        await server.stream(client, "Warm up with", 16, **more)
    results.append(await measure(server, seed, more))


if __name__ == "__main__":
    typer.run(main)
