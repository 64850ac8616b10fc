"""Profiles of chat models: each strategy's accuracy, or its agreement with the one that leaves nothing out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from skipkernels.calibration.passages import cut_passages
from skipkernels.chat.chat import ChatModel
from skipkernels.chat.closed_loop import closed_loop_ms
from skipkernels.chat.engine_worker import EngineModel
from skipkernels.chat.neuron_levels import measured_kl
from skipkernels.chat.step_times import measure_steps
from skipkernels.chat.text_format import PROFILED_NEW_TOKENS, PROFILED_PROMPT_TOKENS, TextPrompt
from skipkernels.chat.text_model import TextModel
from skipkernels.chat.when_idle import WhenIdle
from skipkernels.modality.errors import ProfileError
from skipkernels.modality.job import Request
from skipkernels.modality.profile import Profile, StrategyProfile, Timing
from skipkernels.modality.profiler import Progress, Sample, measure_profile
from skipkernels.modality.step_times import StepTimes
from skipkernels.modality.strategy import Strategy

T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        passages: how many to cut from a text; given samples are all used.
        rounds: timings of each strategy and batch size.
        batch_sizes: batch sizes to time, besides the largest; those between are interpolated.
        memory: whether to measure peak memory.
    """

    passages: int
    rounds: int
    batch_sizes: tuple[int, ...]
    memory: bool

    def sizes(self, largest: int) -> list[int]:
        return sorted({1, largest, *(size for size in self.batch_sizes if size < largest)})


QUICK = Effort(passages=48, rounds=3, batch_sizes=(1,), memory=False)
"""For a quick start: serving corrects the times, but few samples give low promised accuracies."""
IDLE = Effort(passages=96, rounds=3, batch_sizes=(1, 4), memory=False)
"""For the idle time of a server that is in use already."""
THOROUGH = Effort(passages=400, rounds=20, batch_sizes=(1, 2, 4, 8), memory=True)
"""For profiles that are kept in a file."""


@dataclass(frozen=True, eq=False)
class ChatSample:
    """A chat to profile on.

    Args:
        request: with all of the model's modalities.
        expected: the right answer; None: the model's own answer when it leaves nothing out.
    """

    request: Request
    expected: str | None = None


def profile_of_texts(
    model: TextModel,
    texts: Sequence[str],
    effort: Effort,
    max_batch_size: int,
    *,
    slots: bool = True,
    journal: str | Path | None = None,
    progress: Progress = lambda stage, share: None,
    idle: WhenIdle | None = None,
) -> Profile:
    """``profile_of_samples`` on passages of ``texts``, as requests whose work is 1, and each level's KL from the dense
    model.

    Raises:
        RequestError: the texts are too short.
        ProfileError: see ``profile_of_samples``.
    """
    search, held_out = cut_passages(model.engine, texts, effort.passages, PROFILED_PROMPT_TOKENS, 1)
    prompts = [passage.token_ids[:PROFILED_PROMPT_TOKENS] for passage in search + held_out]
    samples = [ChatSample(Request({"text": TextPrompt(prompt, PROFILED_NEW_TOKENS)})) for prompt in prompts]
    profile = profile_of_samples(
        model, samples, effort, max_batch_size, slots=slots, journal=journal, progress=progress, idle=idle
    )
    policies = {strategy.skip_level: model.policy(strategy) for strategy in model.strategies}
    kl = measured_kl(model.engine, policies, texts, idle)
    entries = tuple(
        replace(
            entry,
            kl=kl.get(entry.strategy.skip_level),
            steps=_steps(model, entry.strategy, max_batch_size, idle) if slots else None,
        )
        for entry in profile.strategies
    )
    return replace(profile, strategies=entries)


def _steps(model: TextModel, strategy: Strategy, largest: int, idle: WhenIdle | None) -> StepTimes:
    if idle is None:
        return measure_steps(model, strategy, largest)
    return idle.measure(partial(measure_steps, model, strategy, largest, lambda: idle.given_up))


def dense_profile(model: TextModel, max_batch_size: int) -> Profile:
    """A first profile within seconds: what the dense model takes, estimated from short answers. Its accuracy is
    agreement with itself.

    Raises:
        ProfileError: the model does not offer its dense strategy.
    """
    strategy = _offered(model)
    timings = []
    for size in sorted({1, max_batch_size}):
        short, longer = (min(_answer_ms(model, size, tokens) for _ in range(2)) for tokens in _ESTIMATED_ON)
        step_ms = max(0.0, longer - short) / (_ESTIMATED_ON[1] - _ESTIMATED_ON[0])
        whole_ms = short + step_ms * (PROFILED_NEW_TOKENS - _ESTIMATED_ON[0])
        timings.append(Timing(size, whole_ms, whole_ms * _ESTIMATED_SPREAD))
    entry = StrategyProfile(strategy, tuple(timings), 1.0, 1, exact=True)
    source = "estimated from short answers; accuracy: agreement with the dense model"
    return Profile(model.name, model.fingerprint, model.device, model.dtype, (entry,), source)


_ESTIMATED_ON = (4, 20)  # new tokens
_ESTIMATED_SPREAD = 1.2


def _answer_ms(model: TextModel, size: int, new_tokens: int) -> float:
    prompts = [
        TextPrompt(tuple((7 * at + 13 * row) % 251 for at in range(PROFILED_PROMPT_TOKENS)), new_tokens)
        for row in range(size)
    ]
    model.engine.loop.forget_prefixes()
    started = time.perf_counter()
    model.run([{"text": prompt} for prompt in prompts], _fullest(model))
    return (time.perf_counter() - started) * 1e3


def profile_of_samples(
    model: ChatModel,
    samples: Sequence[ChatSample],
    effort: Effort,
    max_batch_size: int,
    *,
    slots: bool = True,
    journal: str | Path | None = None,
    progress: Progress = lambda stage, share: None,
    idle: WhenIdle | None = None,
) -> Profile:
    """Profiles a model on chats. Times are scaled to requests whose work is 1.

    Args:
        samples: all of them with a right answer, or none.
        max_batch_size: the largest batch that the model can run.
        slots: whether requests will join and leave the running step one by one; False: they run as whole batches.
        journal, progress: see ``measure_profile``.
        idle: None: nobody else uses the model. Else measurements run when nobody does.

    Raises:
        ProfileError: there are no samples; or no strategy leaves nothing out, which the others are compared with.
    """
    if idle is not None:
        samples = [replace(one, request=idle.watched(one.request)) for one in samples]

    def attempt(measurement: Callable[[], T]) -> T:
        def measure() -> T:
            if (engine := getattr(model, "engine", None)) is not None:
                engine.loop.forget_prefixes()  # a prompt that was there before costs nothing
            return measurement()

        return measure() if idle is None else idle.measure(measure)

    faithful = all(sample.expected is None for sample in samples)
    if faithful:
        samples = with_own_answers(model, samples, max_batch_size, attempt)
    assert all(sample.expected is not None for sample in samples), "some samples have a right answer, others have none"
    measured = measure_profile(
        model,
        [Sample(sample.request.inputs, sample.expected) for sample in samples],
        batch_sizes=effort.sizes(max_batch_size),
        rounds=effort.rounds,
        memory=effort.memory,
        journal=journal,
        progress=progress,
        attempt=attempt,
        timed=partial(closed_loop_ms, cast(EngineModel, model)) if slots else None,
    )
    mean_work = sum(sample.request.work for sample in samples) / len(samples)
    meaning = f"agreement with {_fullest(model)}" if faithful else "right answers"
    return replace(
        measured,
        strategies=tuple(
            replace(_of_unit_work(entry, mean_work), exact=faithful and entry.strategy == _fullest(model))
            for entry in measured.strategies
        ),
        source=f"measured on {len(samples)} samples; accuracy: {meaning}",
    )


def with_own_answers(
    model: ChatModel,
    samples: Sequence[ChatSample],
    max_batch_size: int,
    attempt: Callable[[Callable[[], Any]], Any] = lambda measurement: measurement(),
) -> list[ChatSample]:
    """The samples, with the model's answers when it leaves nothing out as the expected ones."""
    strategy = _offered(model)
    answers: list[str] = []
    for first in range(0, len(samples), max_batch_size):
        batch = [one.request.inputs for one in samples[first : first + max_batch_size]]
        answers += [answer.text for answer in attempt(partial(model.run, batch, strategy))]
    return [replace(sample, expected=answer) for sample, answer in zip(samples, answers, strict=True)]


def _offered(model: ChatModel) -> Strategy:
    """The strategy that leaves nothing out, which the others are compared with."""
    strategy = _fullest(model)
    if strategy not in model.strategies:
        raise ProfileError(
            f"accuracy is measured against {strategy}, which is not among {model.name}'s strategies; add skip level 0"
        )
    return strategy


def _fullest(model: ChatModel) -> Strategy:
    return Strategy(tuple(model.modalities))


def _of_unit_work(entry: StrategyProfile, work: float) -> StrategyProfile:
    timings = (
        replace(timing, median_ms=timing.median_ms / work, p95_ms=timing.p95_ms / work) for timing in entry.timings
    )
    return replace(entry, timings=tuple(timings))
