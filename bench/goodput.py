"""Goodput of chats that share steps: the highest rate at which 90 % or 99 % of the requests are in time. This project's
scheduler, which may raise skip levels within a promise, beside the same one kept dense, beside smallest requests first
and beside the order of arrival, which is what servers without deadlines do.

Simulated first, then on the engine, in turns, at the rate at which the second one of these is in time for 90 %:

    python bench/goodput.py MODEL --profile profile.json --threads 2

The profile is measured and written where there is no such file; levels of neurons are made as `skipkernels serve` does.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from skipkernels.benchmark.serving.load import replay
from skipkernels.chat.chat_profile import Effort, profile_of_texts
from skipkernels.chat.engine_worker import EngineWorker
from skipkernels.chat.neuron_levels import keep_policies, kept_policies, neuron_policies
from skipkernels.chat.text_format import TextPrompt, work_of
from skipkernels.chat.text_model import TextModel, shared_prefix
from skipkernels.cli.builtin_text import documentation
from skipkernels.engine import Engine
from skipkernels.modality.arrival import Arrival
from skipkernels.modality.job import Job, Request
from skipkernels.modality.metrics import Outcome
from skipkernels.modality.profile import Profile
from skipkernels.modality.profile_file import load_profile, save_profile
from skipkernels.modality.runtime import Runtime
from skipkernels.modality.simulator import simulate
from skipkernels.modality.step_times import StepTimes
from skipkernels.skipping.policy import DensePolicy
from skipkernels.workloads.arrivals import poisson

_PATIENCE_MS = 1e9  # beyond all deadlines, so that the order that stands in its place is all that counts
_PRECISION = 0.02

Order = Callable[[float, float, float], float]
"""Called as (arrival, deadline from then on, work); returns the deadline that the scheduler is told."""


def by_deadline(at_ms: float, deadline_ms: float, work: float) -> float:
    return deadline_ms


def by_size(at_ms: float, deadline_ms: float, work: float) -> float:
    return _PATIENCE_MS + 1e6 * work - at_ms


def by_arrival(at_ms: float, deadline_ms: float, work: float) -> float:
    return _PATIENCE_MS


@dataclass(frozen=True)
class Contender:
    name: str
    order: Order
    selection: str
    skips: bool

    def profile(self, profile: Profile) -> Profile:
        dense = tuple(entry for entry in profile.strategies if entry.strategy.skip_level == 0.0)
        return profile if self.skips else replace(profile, strategies=dense)


CONTENDERS = (
    Contender("in the order of arrival", by_arrival, "full", False),
    Contender("smallest first", by_size, "full", False),
    Contender("deadlines, dense", by_deadline, "full", False),
    Contender("deadlines and skip levels", by_deadline, "maximize", True),
)
_SECOND = CONTENDERS[1]


@dataclass(frozen=True)
class Allowed:
    """What a request may take: its time alone, so many times, and a constant. ``spread``: how much the multiple differs
    between requests of one size, the standard deviation of its logarithm; 0: a deadline says no more than the size."""

    stretch: float
    spread: float
    extra_ms: float


@dataclass(frozen=True)
class Chats:
    """Requests of mixed length, and what each is allowed to take."""

    prompt_tokens: Sequence[int]
    new_tokens: Sequence[int]
    deadlines_ms: Sequence[float]
    times: Sequence[float]  # of arrival, ms at one request a second
    seed: int

    @classmethod
    def draw(cls, jobs: int, steps: StepTimes, allowed: Allowed, seed: int) -> Chats:
        rng = np.random.default_rng(seed)
        prompts = np.clip(rng.lognormal(math.log(64), 0.8, jobs), 8, 400).astype(int).tolist()
        news = np.clip(rng.lognormal(math.log(40), 0.7, jobs), 4, 200).astype(int).tolist()
        urgencies = np.exp(allowed.spread * rng.standard_normal(jobs)).tolist()
        alone = [
            prompt * steps.prompt_ms + new * steps.step_ms(1, prompt + new / 2)
            for prompt, new in zip(prompts, news, strict=True)
        ]
        deadlines = [
            allowed.stretch * urgency * ms + allowed.extra_ms for ms, urgency in zip(alone, urgencies, strict=True)
        ]
        return cls(prompts, news, deadlines, list(map(float, poisson(1.0, jobs, rng))), seed)

    def arrivals(self, rate: float, steps: StepTimes, order: Order, min_accuracy: float) -> list[Arrival]:
        rng = np.random.default_rng(self.seed + 1)
        share = steps.prompt_ms / steps.step_ms(1, steps.positions)
        arrivals = []
        for number, at in enumerate(self.times):
            prompt, new = self.prompt_tokens[number], self.new_tokens[number]
            work = work_of(prompt, new, share)
            text = TextPrompt(tuple(map(int, rng.integers(1000, 20_000, prompt))), new, eos_token_ids=())
            request = Request({"text": text}, work=work, prompt_tokens=prompt, new_tokens=new)
            deadline_ms = order(at / rate, self.deadlines_ms[number], work)
            arrivals.append(Arrival(at / rate, Job([request], deadline_ms=deadline_ms, min_accuracy=min_accuracy)))
        return arrivals

    def in_time(self, outcomes: Sequence[Outcome]) -> float:
        """Share of the requests that kept their own deadline."""
        kept = [
            outcome.answer is not None and outcome.answer.time_ms <= deadline_ms
            for outcome, deadline_ms in zip(outcomes, self.deadlines_ms, strict=True)
        ]
        return sum(kept) / len(kept)


@dataclass(frozen=True)
class Bench:
    """Contenders on a model of so many slots, as it was profiled."""

    measured: Profile
    slots: int
    min_accuracy: float

    @property
    def steps(self) -> StepTimes:
        """Of the dense model."""
        steps = self.measured.full(self.measured.modalities).steps
        if steps is None:
            raise typer.BadParameter("the profile holds no times of steps; measure it again")
        return steps

    def simulated(self, contender: Contender, chats: Chats, rate: float) -> list[Outcome]:
        arrivals = chats.arrivals(rate, self.steps, contender.order, self.min_accuracy)
        own = contender.profile(self.measured)
        return simulate(arrivals, own, contender.selection, workers=self.slots, slots=self.slots)

    def goodput(self, contender: Contender, chats: Chats, wanted: float) -> float:
        """The highest rate at which this share is in time, by bisection."""
        low, high = 0.01, 1000.0
        while high > (1 + _PRECISION) * low:
            middle = math.sqrt(low * high)
            enough = chats.in_time(self.simulated(contender, chats, middle)) >= wanted
            low, high = (middle, high) if enough else (low, middle)
        return low

    def real(self, contender: Contender, chats: Chats, rate: float, model: TextModel) -> list[Outcome]:
        arrivals = chats.arrivals(rate, self.steps, contender.order, self.min_accuracy)

        async def replayed() -> list[Outcome]:
            async with Runtime(contender.profile(self.measured), [EngineWorker(model)], contender.selection) as runtime:
                return await replay(arrivals, runtime.submit)

        model.engine.loop.forget_prefixes()
        return asyncio.run(replayed())


def promised(outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(outcome.answer.promised_accuracy for outcome in outcomes if outcome.answer)


def served(path: Path, levels: Sequence[float], slots: int, threads: int) -> TextModel:
    engine = Engine.from_pretrained(path, max_batch_size=slots, max_seq_len=1024, num_threads=threads, neuron_rows=True)
    wanted = [level for level in levels if level > 0.0]
    policies = kept_policies(engine, wanted)
    if policies is None:
        policies = neuron_policies(engine, documentation(), wanted)
        keep_policies(engine, policies)
    return TextModel(path.name, engine, {0.0: DensePolicy()} | policies, shared_prefix)


def main(
    model: Path,
    profile: Annotated[Path, typer.Option(help="A file; measured where there is none.")],
    levels: str = "0,0.1,0.2",
    slots: int = 8,
    jobs: int = 600,
    draws: Annotated[int, typer.Option(help="Of jobs, for the simulations.")] = 3,
    stretch: Annotated[float, typer.Option(help="A deadline is the time alone, so many times, ...")] = 6.0,
    extra_ms: Annotated[float, typer.Option(help="... and this.")] = 500.0,
    spread: Annotated[float, typer.Option(help="Of that multiple over requests of one size: sigma of its log.")] = 0.5,
    min_accuracy: Annotated[float, typer.Option(help="What every answer has to promise.")] = 0.0,
    real_jobs: Annotated[int, typer.Option(help="On the engine; 0: simulated only.")] = 60,
    threads: int = 2,
    out: Annotated[Path | None, typer.Option(help="A JSON file.")] = None,
) -> None:
    loaded = None
    if real_jobs or not profile.exists():
        loaded = served(model, [float(level) for level in levels.split(",")], slots, threads)
    if loaded is not None and not profile.exists():
        save_profile(profile, profile_of_texts(loaded, documentation(), Effort(4, 2, (1,), memory=False), slots))
    allowed = Allowed(stretch, spread, extra_ms)
    bench = Bench(load_profile(profile), slots, min_accuracy)
    drawn = [Chats.draw(jobs, bench.steps, allowed, seed) for seed in range(draws)]
    found: dict[str, dict[str, list[float]]] = {}
    for contender in CONTENDERS:
        at_90, at_99 = ([bench.goodput(contender, chats, wanted) for chats in drawn] for wanted in (0.9, 0.99))
        promises = [promised(bench.simulated(contender, chats, rate)) for chats, rate in zip(drawn, at_90, strict=True)]
        found[contender.name] = {"p90, requests/s": at_90, "p99, requests/s": at_99, "promised": promises}
    if loaded is not None and real_jobs:
        few = Chats.draw(real_jobs, bench.steps, allowed, draws)
        rate = statistics.median(found[_SECOND.name]["p90, requests/s"])
        for contender in CONTENDERS:
            said = few.in_time(bench.simulated(contender, few, rate))
            outcomes = bench.real(contender, few, rate, loaded)
            found[contender.name] |= {
                f"on the engine at {rate:.2f}/s, in time": [few.in_time(outcomes)],
                "the same simulated, in time": [said],
                "on the engine, promised": [promised(outcomes)],
            }
    table = Table(model.name, *found)
    for what in next(iter(found.values())):
        cells = [figures[what] for figures in found.values()]
        table.add_row(what, *(f"{statistics.median(cell):.3g} ({min(cell):.3g} to {max(cell):.3g})" for cell in cells))
    Console(width=160).print(table)
    if out is not None:
        about = {"model": model.name, "threads": threads, "slots": slots, "jobs": jobs, "real_jobs": real_jobs}
        about |= {"allowed": asdict(allowed), "min_accuracy": min_accuracy}
        steps = {one.strategy.name: str(one.steps) for one in bench.measured.strategies}
        out.write_text(json.dumps(about | {"steps": steps, "contenders": found}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
