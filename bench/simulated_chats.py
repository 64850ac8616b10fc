"""Whether the simulator of the scheduler says what a real server of a text model does: the same arrivals of prompts,
which join and leave the running step one by one, once on the engine and once on a virtual clock.

    python bench/simulated_chats.py MODEL --threads 2
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
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
from skipkernels.chat.text_format import PROFILED_NEW_TOKENS, PROFILED_PROMPT_TOKENS, TextPrompt
from skipkernels.chat.text_model import TextModel, shared_prefix
from skipkernels.cli.builtin_text import documentation
from skipkernels.modality.arrival import Arrival
from skipkernels.modality.job import Job, Request
from skipkernels.modality.metrics import Outcome, Summary, summarise
from skipkernels.modality.profile import Profile
from skipkernels.modality.runtime import Runtime
from skipkernels.modality.simulator import simulate
from skipkernels.skipping.policy import DensePolicy
from skipkernels.workloads.arrivals import poisson


async def real(model: TextModel, profile: Profile, arrivals: Sequence[Arrival]) -> list[Outcome]:
    async with Runtime(profile, [EngineWorker(model)]) as runtime:
        return await replay(arrivals, runtime.submit, lambda job, answer: ())


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
    profile_rounds: int = 3,
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    engine = Engine.from_pretrained(model, max_batch_size=rows, max_seq_len=1024, num_threads=threads)
    served = TextModel(model.name, engine, {0.0: DensePolicy()}, shared_prefix)
    texts = ["\n\n".join(documentation())]
    sizes = tuple(sorted({1, 2, rows // 2}))
    profile = profile_of_texts(served, texts, Effort(8, profile_rounds, sizes, memory=False), rows)
    (entry,) = profile.strategies
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
            text = TextPrompt(prompt, new_tokens, eos_token_ids=())
            request = Request({"text": text}, work=new_tokens / PROFILED_NEW_TOKENS)
            arrivals.append(Arrival(float(at_ms), Job([request])))
        engine.loop.forget_prefixes()
        ran = figures(summarise(asyncio.run(real(served, profile, arrivals))))
        told = figures(summarise(simulate(arrivals, profile, workers=rows, slots=rows)))
        found.append({"share": share, "offered/s": rate, "real": ran, "simulated": told})
    table = Table("load", "", "real", "simulated", "off by")
    for one in found:
        for what, value in one["real"].items():
            said = one["simulated"][what]
            table.add_row(f"{one['share']:g}", what, f"{value:.2f}", f"{said:.2f}", f"{said / value - 1:+.1%}")
    Console(width=100).print(table)
    if out is not None:
        timings = {timing.batch_size: timing.median_ms for timing in entry.timings}
        document = {"model": model.name, "threads": threads, "rows": rows, "jobs": jobs, "profile_ms": timings}
        out.write_text(json.dumps(document | {"loads": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
