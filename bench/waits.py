"""What requests wait for when they share one engine: a short answer beside a long one, a stream beside a long prompt, a
prompt that was there before.

    python bench/waits.py MODEL --threads 2
"""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from skipkernels import Engine

LONG_ANSWER, SHORT_ANSWER = 400, 8
LONG_PROMPT, REPEATED_PROMPT = 3000, 1800


def first_token_s(engine: Engine, prompt: list[int], new_tokens: int) -> float:
    """From the request to its first token."""
    return engine.submit(prompt, max_new_tokens=new_tokens, eos_token_ids=()).result().time_to_first_token_s


def behind_a_long_answer(engine: Engine, short: list[int]) -> tuple[float, float]:
    """Seconds of a short answer alone, and while a long one runs in another thread."""
    started = time.perf_counter()
    first_token_s(engine, short, SHORT_ANSWER)
    alone = time.perf_counter() - started
    engine.loop.forget_prefixes()
    long = engine.submit(short[:8], max_new_tokens=LONG_ANSWER, eos_token_ids=())
    thread = threading.Thread(target=long.result)
    thread.start()
    time.sleep(0.3)
    started = time.perf_counter()
    first_token_s(engine, short, SHORT_ANSWER)
    beside = time.perf_counter() - started
    thread.join()
    return alone, beside


def gaps_of_a_stream(engine: Engine, prompt: list[int]) -> tuple[float, float]:
    """Median gap between two tokens of a stream alone, and the longest while a long prompt comes in."""
    stream = iter(engine.submit(prompt[:16], max_new_tokens=LONG_ANSWER, eos_token_ids=()))
    alone, beside = [], []
    before, other = time.perf_counter(), None
    for number, chunk in enumerate(stream):
        now = time.perf_counter()
        if 10 < number <= 60:
            alone.append(now - before)
        if number == 60:
            other = engine.submit(prompt, max_new_tokens=1, eos_token_ids=())
        if number > 61 and other is not None and not other.token_ids:
            beside.append(now - before)
        before = now
        if chunk.token_id is None:
            break
    if other is not None:
        other.result()
    return statistics.median(alone), max(beside)


def main(
    model: Annotated[Path, typer.Argument(help="A folder with a checkpoint.", exists=True)],
    threads: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Time what requests wait for, and print the medians."""
    engine = Engine.from_pretrained(model, num_threads=threads, max_batch_size=8, max_seq_len=4096)
    tokens = [(7919 * n) % 40000 + 100 for n in range(LONG_PROMPT)]
    rows: dict[str, list[float]] = {}
    for number in range(rounds):
        prompt = [token + number for token in tokens]  # nothing of the round before is found again
        alone, beside = behind_a_long_answer(engine, prompt[:40])
        gap, longest = gaps_of_a_stream(engine, prompt)
        engine.loop.forget_prefixes()
        fresh = first_token_s(engine, prompt[:REPEATED_PROMPT], 1)
        again = first_token_s(engine, prompt[:REPEATED_PROMPT], 1)
        for name, value in (
            ("short answer alone, ms", 1e3 * alone),
            ("the same behind a long one, ms", 1e3 * beside),
            ("gap of a stream, ms", 1e3 * gap),
            (f"its longest while {LONG_PROMPT} tokens come in, ms", 1e3 * longest),
            ("longest over usual", longest / gap),
            (f"first token of {REPEATED_PROMPT} tokens, ms", 1e3 * fresh),
            ("the same prompt again, ms", 1e3 * again),
            ("first over again", fresh / again),
        ):
            rows.setdefault(name, []).append(value)
    table = Table("", "median", "least", "most", title=f"{model.name}, {engine.dtype}, {threads} threads")
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.1f}" for value in (statistics.median(values), min(values), max(values))))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
