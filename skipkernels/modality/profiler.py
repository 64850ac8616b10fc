"""Measures a profile: time and memory of every strategy at every batch size, and accuracy on validation samples.

1. Accuracy: every strategy runs over all samples.
2. Memory: the peak of every strategy and batch size.
3. Time: several rounds over all strategies and batch sizes, each in another order, so that other load and drifts of
   the clock speed affect all of them alike.

Each result is written to a journal at once; a killed profiler resumes with what is missing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from skipkernels.modality.errors import ProfileError
from skipkernels.modality.journal import Journal
from skipkernels.modality.profile import Profile, StrategyProfile, Timing
from skipkernels.modality.strategy import Inputs, ModalityModel, Strategy
from skipkernels.support.memory import peak_memory_bytes

Progress = Callable[[str, float], None]
"""Called as (what is being done, share of the whole that is done)."""

Attempt = Callable[[Callable[[], float]], float]
"""Called with a measurement, when its turn has come; returns its result. May call it again if it was disturbed."""

Timed = Callable[[Sequence[Inputs], Strategy, int], float]
"""Called as (inputs of ``2 * size - 1`` requests, strategy, size); returns milliseconds of a request while ``size`` of
them share their steps."""

_SHARES = {"accuracy": (0.0, 0.4), "memory": (0.4, 0.5), "time": (0.5, 1.0)}  # of the progress bar


@dataclass(frozen=True)
class Sample:
    """One validation sample, with all of the model's modalities."""

    inputs: Inputs
    expected: Any  # what ``ModalityModel.score`` compares with


def measure_profile(
    model: ModalityModel,
    samples: Sequence[Sample],
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    rounds: int = 20,
    memory: bool = True,
    journal: str | Path | None = None,
    progress: Progress = lambda stage, share: None,
    attempt: Attempt = lambda measure: measure(),
    timed: Timed | None = None,
) -> Profile:
    """
    Args:
        samples: held out from training; the promised accuracies are bounds for inputs like these. Give the same ones
            when a killed measurement is continued.
        batch_sizes: increasing from 1.
        rounds: timings of each strategy and batch size. The 95th percentile of 20 lies between the two slowest.
        memory: whether to measure peak memory; without it, a memory budget cannot be set.
        journal: where to keep results until all are measured; an existing file is resumed.
        progress, attempt: see ``Progress`` and ``Attempt``.
        timed: None: the times are those of whole batches. Else see ``Timed``.

    Raises:
        ProfileError: the arguments are impossible, or the journal is another measurement's.
        DeviceError: memory cannot be measured on the model's device.
    """
    if not samples or rounds < 2:
        raise ProfileError(f"a profile needs a sample and two rounds, got {len(samples)} and {rounds}")
    if list(batch_sizes) != sorted({1, *batch_sizes}):
        raise ProfileError(f"batch sizes must increase from 1, got {list(batch_sizes)}")
    header = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "device": model.device,
        "dtype": model.dtype,
        "strategies": [strategy.name for strategy in model.strategies],
        "batch_sizes": list(batch_sizes),
        "rounds": rounds,
        "samples": len(samples),
        "timed": "batches" if timed is None else "requests in slots",
    }
    profiler = _Profiler(model, samples, list(batch_sizes), rounds, Journal(journal, header), progress, attempt, timed)
    return profiler.measure(memory)


class _Profiler:
    def __init__(
        self,
        model: ModalityModel,
        samples: Sequence[Sample],
        batch_sizes: list[int],
        rounds: int,
        journal: Journal,
        progress: Progress,
        attempt: Attempt,
        timed: Timed | None,
    ) -> None:
        self._model = model
        self._samples = samples
        self._batch_sizes = batch_sizes
        self._rounds = rounds
        self._journal = journal
        self._progress = progress
        self._attempt = attempt
        self._timed = timed
        self._done = {(entry["what"], *entry["key"]): entry["value"] for entry in journal.entries}

    def measure(self, memory: bool) -> Profile:
        model, largest = self._model, self._batch_sizes[-1]
        names = [strategy.name for strategy in model.strategies]
        cells = list(product(names, self._batch_sizes))

        chunks = list(product(names, range(0, len(self._samples), largest)))
        scores = self._measure("accuracy", chunks, lambda name, first: self._score(name, first, first + largest))
        peaks = self._measure("memory", cells if memory else [], self._peak)
        for name, size in cells:
            # warm-up: compilation, caches and page faults of the first run are not timed
            self._attempt(partial(self._time, name, size, 0))
        turns = []
        for turn in range(self._rounds):
            shuffled = [(name, size, turn) for name, size in cells]
            random.Random(turn).shuffle(shuffled)
            turns += shuffled
        times = self._measure("time", turns, self._time)

        entries = []
        for strategy in model.strategies:
            timings = []
            for size in self._batch_sizes:
                taken_ms = [times[strategy.name, size, turn] for turn in range(self._rounds)]
                median_ms, p95_ms = np.quantile(taken_ms, (0.5, 0.95))
                peak = int(peaks[strategy.name, size]) if memory else None
                timings.append(Timing(size, round(float(median_ms), 4), round(float(p95_ms), 4), peak))
            score_sum = sum(score for (name, _), score in scores.items() if name == strategy.name)
            entries.append(StrategyProfile(strategy, tuple(timings), score_sum, len(self._samples)))
        profile = Profile(model.name, model.fingerprint, model.device, model.dtype, tuple(entries))
        self._journal.close()
        return profile

    def _measure(
        self, what: str, keys: Sequence[tuple[Any, ...]], measure: Callable[..., float]
    ) -> dict[tuple[Any, ...], float]:
        """One value for each key, from the journal where it is there."""
        begin, end = _SHARES[what]
        for number, key in enumerate(keys):
            self._progress(f"{what} of {key[0]}", begin + (end - begin) * number / len(keys))
            if (what, *key) not in self._done:
                value = self._done[what, *key] = self._attempt(partial(measure, *key))
                self._journal.add({"what": what, "key": key, "value": value})
        self._progress(what, end)
        return {key: self._done[what, *key] for key in keys}

    def _score(self, name: str, first: int, last: int) -> float:
        samples = self._samples[first:last]
        outputs = self._model.run([sample.inputs for sample in samples], Strategy.parse(name))
        scores = [self._model.score(output, one.expected) for output, one in zip(outputs, samples, strict=True)]
        wrong = [score for score in scores if not 0.0 <= score <= 1.0]
        if wrong:
            raise ProfileError(f"{self._model.name}: a score must lie in [0, 1], {name} got {wrong[0]}")
        return float(sum(scores))

    def _peak(self, name: str, size: int) -> float:
        return peak_memory_bytes(self._model.device, lambda: self._run(name, size, 0))

    def _time(self, name: str, size: int, turn: int) -> float:
        if self._timed is not None:
            return self._timed(self._inputs(2 * size - 1, turn), Strategy.parse(name), size)
        begin = time.perf_counter()
        self._run(name, size, turn)
        return (time.perf_counter() - begin) * 1e3

    def _run(self, name: str, size: int, turn: int) -> None:
        self._model.run(self._inputs(size, turn), Strategy.parse(name))

    def _inputs(self, count: int, turn: int) -> list[Inputs]:
        """Of samples, different ones each turn."""
        return [self._samples[(turn * count + offset) % len(self._samples)].inputs for offset in range(count)]
