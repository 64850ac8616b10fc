"""Whether the simulator of the scheduler says what a real server of a text model does: the same arrivals of prompts,
which join and leave the running step one by one, once on the engine and once on a virtual clock.

Near capacity waiting grows several times as fast as steps do, and what a step takes changes with what others do on the
machine. So steps are profiled before and after every run, and simulated with the mean of both. How far they lie apart
says what the comparison can be worth; beside it stands the simulation with what the steps of that very run took, which
is off by what the simulator itself does wrong.

    python bench/simulated_chats.py MODEL --threads 2
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from skipkernels import Engine
from skipkernels.benchmark.serving.load import replay
from skipkernels.calibration.passages import cut_passages
from skipkernels.chat.chat_profile import Effort, profile_of_texts
from skipkernels.chat.engine_worker import EngineWorker
from skipkernels.chat.step_times import measure_steps
from skipkernels.chat.text_format import PROFILED_NEW_TOKENS, PROFILED_PROMPT_TOKENS, TextFormat
from skipkernels.chat.text_model import TextModel, shared_prefix
from skipkernels.cli.builtin_text import documentation
from skipkernels.decoding.generation import SamplingParams
from skipkernels.modality.arrival import Arrival
from skipkernels.modality.job import Job
from skipkernels.modality.metrics import Outcome, Summary, summarise
from skipkernels.modality.profile import Profile
from skipkernels.modality.runtime import Runtime
from skipkernels.modality.simulator import simulate
from skipkernels.modality.step_times import StepTimes
from skipkernels.skipping.policy import DensePolicy
from skipkernels.workloads.arrivals import poisson

_BETWEEN_S = 0.05  # between two steps; after more, nobody was there
_FEW = 5


async def real(model: TextModel, profile: Profile, arrivals: Sequence[Arrival]) -> list[Outcome]:
    async with Runtime(profile, [EngineWorker(model)]) as runtime:
        return await replay(arrivals, runtime.submit, lambda job, answer: ())


@contextmanager
def others_time() -> Iterator[list[float]]:
    """Processors that others used during the block, in the mean: what a run beside them says is not the model's."""
    before, own, began = _busy_s(), time.process_time(), time.perf_counter()
    used: list[float] = []
    yield used
    spent_s = _busy_s() - before - (time.process_time() - own)
    used.append(max(0.0, spent_s) / (time.perf_counter() - began))


def _busy_s() -> float:
    """Of all processors since the start; user, nice and system."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return sum(map(int, fields[1:4])) / os.sysconf("SC_CLK_TCK")


class StepLog:
    """What the steps of a run take, with what lies between one and the next: rows that decode, rows of prompts, ms."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[tuple[int, int, float]] = []
        self._loop = engine.loop

    @contextmanager
    def kept(self) -> Iterator[None]:
        fly, ended = self._loop._fly, -math.inf

        def noted(flight: Any) -> None:
            nonlocal ended
            prompts = 0 if flight.done else flight.step.num_prompt_rows
            rows = sum(not self._loop._has_ended(row) for row in flight.step.decode_rows)
            began = time.perf_counter()
            fly(flight)
            since = ended if began - ended < _BETWEEN_S else began
            ended = time.perf_counter()
            self.steps.append((rows, prompts, 1e3 * (ended - since)))

        self._loop._fly = noted  # type: ignore[method-assign]
        try:
            yield
        finally:
            self._loop._fly = fly  # type: ignore[method-assign]

    def times(self, profiled: StepTimes) -> StepTimes:
        """Numbers of rows that hardly came up are taken from ``profiled``, as much longer as the others were."""
        by_rows: dict[int, list[float]] = {}
        for rows, prompts, ms in self.steps:
            if not prompts:
                by_rows.setdefault(rows, []).append(ms)
        own = {rows: statistics.fmean(times) for rows, times in by_rows.items() if len(times) >= _FEW}
        longer = statistics.fmean(own[rows] / ms for rows, ms in profiled.decode_ms if rows in own)
        decode_ms = tuple((rows, own.get(rows, ms * longer)) for rows, ms in profiled.decode_ms)
        taken = dict(decode_ms)
        reading = [(taken[rows], prompts, ms) for rows, prompts, ms in self.steps if prompts and rows in taken]
        read = sum(prompts for _, prompts, _ in reading)
        return replace(
            profiled,
            decode_ms=decode_ms,
            prompt_ms=sum(ms - alone for alone, _, ms in reading) / read,
            prompt_rows=read / len(reading),
        )


def between(before: StepTimes, after: StepTimes) -> StepTimes:
    """What lies in the middle of two profiles of the same numbers of rows."""
    pairs = zip(before.decode_ms, after.decode_ms, strict=True)
    return StepTimes(
        decode_ms=tuple((rows, (first + second) / 2) for (rows, first), (_, second) in pairs),
        positions=before.positions,
        position_ms=(before.position_ms + after.position_ms) / 2,
        prompt_ms=(before.prompt_ms + after.prompt_ms) / 2,
        prompt_rows=(before.prompt_rows + after.prompt_rows) / 2,
    )


def with_steps(profile: Profile, steps: StepTimes) -> Profile:
    """Of one strategy."""
    (entry,) = profile.strategies
    return replace(profile, strategies=(replace(entry, steps=steps),))


def drift(before: StepTimes, after: StepTimes) -> float:
    """By how much steps took longer after the run, in the mean over the numbers of rows."""
    pairs = zip(before.decode_ms, after.decode_ms, strict=True)
    return statistics.fmean(second / first for (_, first), (_, second) in pairs) - 1.0


def figures(summary: Summary) -> dict[str, float]:
    return {
        "requests/s": summary.throughput_per_s,
        "mean ms": summary.completion_mean_ms,
        "p99 ms": summary.completion_p99_ms,
    }


def main(
    model: Path,
    threads: int = 2,
    rows: Annotated[int, typer.Option(help="Slots.")] = 8,
    jobs: int = 60,
    loads: Annotated[str, typer.Option(help="Shares of what the slots carry.")] = "0.5,0.8",
    profile_rounds: int = 2,
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    engine = Engine.from_pretrained(model, max_batch_size=rows, max_seq_len=1024, num_threads=threads)
    served = TextModel(model.name, engine, {0.0: DensePolicy()}, shared_prefix)
    assert isinstance(served.format, TextFormat)
    texts = ["\n\n".join(documentation())]
    profile = profile_of_texts(served, texts, Effort(2, profile_rounds, (1, rows // 2), memory=False), rows)
    (entry,) = profile.strategies
    assert entry.steps is not None, "requests share steps"
    before = entry.steps
    _, passages = cut_passages(engine, texts, 2 * jobs, PROFILED_PROMPT_TOKENS, 1)
    prompts = [passage.token_ids[:PROFILED_PROMPT_TOKENS] for passage in passages]
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    for share in map(float, loads.split(",")):
        rate = share * rows * 1e3 / entry.median_ms(rows)
        works = np.clip(rng.lognormal(-0.3, 0.5, jobs), 0.2, 2.0)
        arrivals = []
        for number, at_ms in enumerate(poisson(rate, jobs, rng)):
            prompt = prompts[number % len(prompts)]
            new_tokens = max(4, math.floor(PROFILED_NEW_TOKENS * works[number]))
            request = served.format.prompt_request(prompt, new_tokens, SamplingParams(), eos_token_ids=())
            arrivals.append(Arrival(float(at_ms), Job([request])))
        engine.loop.forget_prefixes()
        log = StepLog(engine)
        with others_time() as others, log.kept():
            ran = figures(summarise(asyncio.run(real(served, profile, arrivals))))
        after = measure_steps(served, entry.strategy, rows)
        told, own = (
            figures(summarise(simulate(arrivals, with_steps(profile, steps), workers=rows, slots=rows)))
            for steps in (between(before, after), log.times(before))
        )
        found.append(
            {"share": share, "offered/s": rate, "real": ran, "simulated": told, "with its own steps": own}
            | {"others": others[0], "drift": drift(before, after)}
            | {"before": asdict(before), "after": asdict(after), "own": asdict(log.times(before))}
        )
        before = after
    table = Table("load", "", "real", "simulated", "off by", "with its own steps", "off by")
    for one in found:
        for what, value in one["real"].items():
            said = (one["simulated"][what], one["with its own steps"][what])
            cells = (text for told in said for text in (f"{told:.2f}", f"{told / value - 1:+.1%}"))
            table.add_row(f"{one['share']:g}", what, f"{value:.2f}", *cells)
        table.add_row(f"{one['share']:g}", "processors that others used meanwhile", f"{one['others']:.2f}", "", "")
        table.add_row(f"{one['share']:g}", "steps after the run, over before", "", "", f"{one['drift']:+.1%}")
    Console(width=120).print(table)
    if out is not None:
        timings = {timing.batch_size: timing.median_ms for timing in entry.timings}
        document = {"model": model.name, "threads": threads, "rows": rows, "jobs": jobs, "profile_ms": timings}
        out.write_text(json.dumps(document | {"loads": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
