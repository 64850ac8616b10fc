"""Loads that users bring, over HTTP, in turns with llama.cpp's server on the same file: many streams at once, a short
answer behind a long one, a stream beside a long prompt, a prompt that was there before.

    python bench/serving_loads.py MODEL.gguf --llama-server PATH --threads 2 --options "--skip-levels 0"
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
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from skipkernels.cli.builtin_text import documentation

STREAMS, STREAM_TOKENS, STREAM_PROMPT = 16, 64, 24
LONG_ANSWER, SHORT_ANSWER = 400, 8
LONG_PROMPT, REPEATED_PROMPT = 3000, 1800
_TOKENISED = 10_000  # characters
_BEFORE = 40  # tokens of a stream that runs alone
OURS = "skipkernels"
_STARTS_S = 60
_PROFILES_S = 1800.0  # a file in Q4_1 took 190 s of idle time on two cores


@dataclass
class Stream:
    """When its tokens came, in seconds from its request."""

    times: list[float] = field(default_factory=list)

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True)
class Server:
    """One that runs."""

    name: str
    url: str
    client: httpx.AsyncClient
    more: dict[str, Any] = field(default_factory=dict)  # fields of every request

    async def ask(self, prompt: list[int], tokens: int) -> AsyncGenerator[float]:
        """The times of ``tokens`` greedy tokens after ``prompt``."""
        asked = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True}
        asked |= {"ignore_eos": True} | self.more
        started = time.perf_counter()
        async with self.client.stream("POST", f"{self.url}/v1/completions", json=asked) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{self.name}: {await response.aread()!r}")
            async for line in response.aiter_lines():
                if line.startswith("data: {") and any(c.get("text") for c in json.loads(line[6:]).get("choices", ())):
                    yield time.perf_counter() - started

    async def stream(self, prompt: list[int], tokens: int) -> Stream:
        return Stream([at async for at in self.ask(prompt, tokens)])


class Prompts:
    """Pieces of documentation, each from another place. Token ids, so that both servers get as many."""

    def __init__(self, url: str) -> None:
        text = "\n\n".join(documentation())
        self._token_ids: list[int] = []
        for first in range(0, len(text), _TOKENISED):
            asked = {"prompt": text[first : first + _TOKENISED], "add_special_tokens": False}
            self._token_ids += httpx.post(f"{url}/tokenize", json=asked, timeout=60).json()["tokens"]
        self._given = 0

    def take(self, tokens: int) -> list[int]:
        """The next one."""
        if self._given + tokens > len(self._token_ids):
            raise RuntimeError(f"{len(self._token_ids)} tokens of documentation are not enough; ask for fewer rounds")
        self._given += tokens
        return self._token_ids[self._given - tokens : self._given]


async def many_streams(server: Server, prompts: Prompts) -> dict[str, float]:
    alone = await server.stream(prompts.take(STREAM_PROMPT), STREAM_TOKENS)
    started = time.perf_counter()
    asked = (server.stream(prompts.take(STREAM_PROMPT), STREAM_TOKENS) for at in range(STREAMS))
    streams = await asyncio.gather(*asked)
    took = time.perf_counter() - started
    firsts = sorted(stream.times[0] for stream in streams)
    one, all_of_them = len(alone.times) / alone.times[-1], sum(len(stream.times) for stream in streams) / took
    return {
        "one stream, tokens/s": one,
        f"{STREAMS} streams, tokens/s": all_of_them,
        "times one": all_of_them / one,
        "first token, median s": statistics.median(firsts),
        "first token, slowest of all s": firsts[-1],
        "longest gap s": max(max(stream.gaps) for stream in streams),
    }


async def behind_a_long_answer(server: Server, prompts: Prompts) -> dict[str, float]:
    alone = await server.stream(prompts.take(STREAM_PROMPT), SHORT_ANSWER)
    long = asyncio.create_task(server.stream(prompts.take(STREAM_PROMPT), LONG_ANSWER))
    await asyncio.sleep(0.3)
    short = await server.stream(prompts.take(STREAM_PROMPT), SHORT_ANSWER)
    behind = not long.done()
    whole = await long
    assert behind, "the long answer ended before the short one"
    return {
        "short answer alone s": alone.times[-1],
        "behind a long one s": short.times[-1],
        "the long one s": whole.times[-1],
    }


async def beside_a_long_prompt(server: Server, prompts: Prompts) -> dict[str, float]:
    stream, other = Stream(), None
    async with aclosing(server.ask(prompts.take(STREAM_PROMPT), 3 * LONG_ANSWER)) as asked:
        async for at in asked:
            stream.times.append(at)
            if len(stream.times) == _BEFORE:
                other = asyncio.create_task(server.stream(prompts.take(LONG_PROMPT), 1))
            if other is not None and other.done():
                break
    assert other is not None, "the stream ended early"
    assert other.done(), "the stream ended before the prompt was there"
    usual, longest = statistics.median(stream.gaps[10 : _BEFORE - 1]), max(stream.gaps[_BEFORE - 1 :])
    return {
        f"prompt of {LONG_PROMPT} tokens, first token s": (await other).times[0],
        "a stream's usual gap ms": 1e3 * usual,
        "its longest beside the prompt ms": 1e3 * longest,
        "longest over usual": longest / usual,
    }


async def a_prompt_again(server: Server, prompts: Prompts) -> dict[str, float]:
    prompt = prompts.take(REPEATED_PROMPT)
    first, again = await server.stream(prompt, 1), await server.stream(prompt, 1)
    return {
        f"prompt of {REPEATED_PROMPT} tokens, first token s": first.times[0],
        "the same again s": again.times[0],
        "first over again": first.times[0] / again.times[0],
    }


Load = Callable[[Server, Prompts], Awaitable[dict[str, float]]]
LOADS: dict[str, Load] = {
    "streams": many_streams,
    "behind": behind_a_long_answer,
    "beside": beside_a_long_prompt,
    "again": a_prompt_again,
}


@contextmanager
def running(name: str, command: list[str], url: str, profiles_s: float = _PROFILES_S) -> Iterator[None]:
    """A server from a command, once it is healthy and says that it measures its strategies no more; it ends with the
    block."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)

        def fail(why: str) -> RuntimeError:
            said.seek(0)
            return RuntimeError(f"{name} {why}: {said.read()[-2000:].decode(errors='replace')}")

        try:
            _wait_for(lambda: process.poll() is not None or _answers(url), _STARTS_S, lambda: fail("does not start"))
            if process.poll() is not None:
                raise fail("ended")
            late = f"still measures its strategies after {profiles_s:g} s (--profiles-s)"
            _wait_for(lambda: not _profiles(url), profiles_s, lambda: fail(late))
            yield
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()


def _wait_for(what: Callable[[], bool], at_most_s: float, failure: Callable[[], Exception]) -> None:
    until = time.perf_counter() + at_most_s
    while not what():
        if time.perf_counter() > until:
            raise failure()
        time.sleep(0.1)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


def _profiles(url: str) -> bool:
    """Our server measures itself while nobody asks it anything; what it measured is kept for the next start."""
    (model,) = httpx.get(f"{url}/v1/models", timeout=10).json()["data"]
    return bool(model.get("skipkernels", {}).get("profiling", False))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def our_command(model: Path, port: int, threads: int, options: str) -> list[str]:
    ours = [sys.executable, "-c", "from skipkernels.cli import main; main()", "serve", str(model), "--port", str(port)]
    return [*ours, "--threads", str(threads), "--served-model-name", "m", *shlex.split(options)]


async def measure(
    servers: dict[str, tuple[str, dict[str, Any]]], loads: list[str], rounds: int
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """By load and server: what each round found. ``servers``: address and further fields of a request."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    prompts = Prompts(servers[OURS][0])
    limits = httpx.Limits(max_connections=2 * STREAMS, max_keepalive_connections=0)  # llama.cpp ends them at any time
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        those = [Server(name, url, client, more) for name, (url, more) in servers.items()]
        for server in those:
            await server.stream(prompts.take(STREAM_PROMPT), 16)  # warm
        for number in range(rounds):
            for load in loads:
                for server in those if number % 2 == 0 else those[::-1]:
                    new = await LOADS[load](server, prompts)
                    print(load, server.name, {what: round(value, 3) for what, value in new.items()}, flush=True)
                    found.setdefault(load, {}).setdefault(server.name, []).append(new)
    return found


def show(found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    for load, by_server in found.items():
        table = Table(load, *by_server)
        for what in next(iter(by_server.values()))[0]:
            cells = [[one[what] for one in rounds] for rounds in by_server.values()]
            table.add_row(what, *(f"{statistics.median(c):.3g} ({min(c):.3g} to {max(c):.3g})" for c in cells))
        Console(width=120).print(table)


def main(
    model: Path,
    llama_server: Annotated[Path | None, typer.Option(help="llama.cpp's, built from its sources.")] = None,
    threads: int = 2,
    rounds: Annotated[int, typer.Option(help="In turns.")] = 3,
    load: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(LOADS)}; all of them.")] = None,
    options: Annotated[str, typer.Option(help="More words for `skipkernels serve`.")] = "--skip-levels 0",
    skip_level: Annotated[list[float] | None, typer.Option(help="Asked for beside the dense model, in turns.")] = None,
    profiles_s: Annotated[float, typer.Option(help="How long our server may measure itself before.")] = _PROFILES_S,
    out: Annotated[Path | None, typer.Option(help="A JSON file; loads of an earlier call stay in it.")] = None,
) -> None:
    """Both servers are there all the time, and only one of them is asked at a time."""
    loads = load or list(LOADS)
    if unknown := [name for name in loads if name not in LOADS]:
        raise typer.BadParameter(f"--load {unknown[0]}: there are {', '.join(LOADS)}")
    with ExitStack() as stack:
        port = free_port()
        servers: dict[str, tuple[str, dict[str, Any]]] = {}
        url = f"http://127.0.0.1:{port}"
        stack.enter_context(running(OURS, our_command(model, port, threads, options), url, profiles_s))
        servers[OURS] = url, {"skip_level": 0.0}
        for level in skip_level or []:
            servers[f"{OURS}, skip level {level:g}"] = url, {"skip_level": level}
        if llama_server is not None:
            port = free_port()
            theirs = [str(llama_server), "-m", str(model), "--port", str(port), "-t", str(threads), "-np", "8"]
            url = f"http://127.0.0.1:{port}"
            stack.enter_context(running("llama.cpp", [*theirs, "-c", "32768", "--no-webui"], url))
            servers["llama.cpp"] = url, {}
        found = asyncio.run(measure(servers, loads, rounds))
    show(found)
    if out is not None:
        earlier = json.loads(out.read_text())["loads"] if out.exists() else {}
        about = {"model": model.name, "threads": threads, "options": options, "processors": os.cpu_count()}
        out.write_text(json.dumps(about | {"loads": earlier | found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
