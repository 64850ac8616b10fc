"""Measures what a step takes, by its rows, what they have cached, and its tokens of prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from skipkernels.chat.engine_worker import EngineModel, submit
from skipkernels.chat.text_format import TextPrompt
from skipkernels.decoding.handle import Handle
from skipkernels.decoding.loop import STEPS_AT_ONCE
from skipkernels.modality.errors import ProfileError
from skipkernels.modality.step_times import StepTimes
from skipkernels.modality.strategy import Strategy

_PROMPT = 32
_OTHER_PROMPT = 96  # beside a request that decodes
_LONG_PROMPT = 512
_STEPS = 32  # timed for each number of rows
_PROMPTS = 4  # timed, one after the other: what a token of one cost was seen to be a third off
_UNKNOWN_MS = 1.0  # where somebody wants the model: the whole measurement is of no use then

Disturbed = Callable[[], bool]
"""Whether somebody else wants the model now."""


def measure_steps(
    model: EngineModel, strategy: Strategy, largest: int, disturbed: Disturbed = lambda: False
) -> StepTimes:
    """Runs its own requests; nobody else's are to be in flight. ``_STEPS`` steps for each number of rows.

    Args:
        largest: number of rows.
    """
    return _Measurement(model, strategy, disturbed).measure(_numbers(largest))


def _numbers(largest: int) -> list[int]:
    """Rows go through matrices some at a time, 4 or 8, so steps grow by stairs: 5 rows of SmolLM2 in bf16 took 40 %
    more than 4, and 8 hardly more than 7. Beyond 8, the ends of stairs of 4 and the next beginnings."""
    beyond = (number for first in range(8, largest, 4) for number in (first + 1, first + 4))
    return sorted({*range(1, min(8, largest) + 1), *(number for number in beyond if number <= largest), largest})


class _Measurement:
    def __init__(self, model: EngineModel, strategy: Strategy, disturbed: Disturbed) -> None:
        self._model = model
        self._strategy = strategy
        self._disturbed = disturbed
        self._vocab = model.engine.config.vocab_size
        self._long = min(_LONG_PROMPT, model.engine.max_seq_len - 2 * _STEPS - 2)
        self._prompts = 0

    def measure(self, sizes: Sequence[int]) -> StepTimes:
        self._model.engine.loop.forget_prefixes()  # a prompt that was there before costs nothing
        decode_ms = tuple((size, self._decoding_ms([_PROMPT] * size)) for size in sizes)
        more = self._long - _PROMPT
        position_ms = max(0.0, (self._decoding_ms([self._long]) - decode_ms[0][1]) / more) if more > 0 else 0.0
        prompt_ms, rows = self._prompt_ms()
        return StepTimes(decode_ms, _PROMPT + _STEPS // 2, position_ms, prompt_ms, rows)

    def _decoding_ms(self, prompts: Sequence[int]) -> float:
        """Mean of a step in which a request for each prompt decodes."""
        if self._disturbed():
            return _UNKNOWN_MS
        handles = [self._begin(tokens) for tokens in prompts]
        try:
            self._run_until_they_decode(handles)
            return self._mean_ms(handles)
        finally:
            _end(handles)

    def _mean_ms(self, handles: Sequence[Handle]) -> float:
        """Of many steps, one after the other; the mean: what takes longer now and then counts too."""
        taken_ms: list[float] = []
        while len(taken_ms) < _STEPS and not self._disturbed():
            taken_ms.append(self._step_ms(handles))
        return statistics.fmean(taken_ms) if taken_ms else _UNKNOWN_MS

    def _prompt_ms(self) -> tuple[float, float]:
        """What a token of a prompt adds beside one that decodes, and how many of them a step takes."""
        stream = self._begin(_PROMPT)
        tokens = min(_OTHER_PROMPT, max(1, self._long))
        others: list[Handle] = []
        try:
            self._run_until_they_decode([stream])
            alone_ms = self._mean_ms([stream])
            taken_ms: list[float] = []
            for _ in range(_PROMPTS):
                others.append(self._begin(tokens))
                while not _decodes(others[-1]) and not self._disturbed():
                    taken_ms.append(self._step_ms([stream, others[-1]]))
                _end(others)
            more_ms, read = sum(taken_ms) - alone_ms * len(taken_ms), _PROMPTS * tokens
            return max(0.0, more_ms) / read, max(1.0, read / max(1, len(taken_ms)))
        finally:
            _end([stream, *others])

    def _begin(self, tokens: int) -> Handle:
        """A request with a prompt that nobody has asked for before."""
        self._prompts += 1
        ids = tuple((7 * at + 13 * self._prompts) % min(251, self._vocab) for at in range(tokens))
        prompt = TextPrompt(ids, self._model.engine.max_seq_len - tokens, eos_token_ids=())
        return submit(self._model, {"text": prompt}, self._strategy)

    def _run_until_they_decode(self, handles: Sequence[Handle]) -> None:
        while not all(map(_decodes, handles)) and not self._disturbed():
            if any(handle.ended for handle in handles):
                raise ProfileError(f"{self._strategy.name}: a request to be timed ended before its first token")
            self._step_ms([])

    def _step_ms(self, handles: Sequence[Handle]) -> float:
        """Of the next step, and of taking what it brought, as a server does; a call plans several, and runs one where
        tokens are streamed."""
        started = time.perf_counter()
        self._model.engine.loop.step(STEPS_AT_ONCE)
        for handle in handles:
            handle.take_chunks()
        return (time.perf_counter() - started) * 1e3


def _decodes(handle: Handle) -> bool:
    return bool(handle.token_ids)


def _end(handles: Sequence[Handle]) -> None:
    for handle in handles:
        handle.cancel(ended_ok=True)
