"""Decoding: the prompts of one request while their tokens come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from skipkernels.decoding.generation import FinishReason, Generation
from skipkernels.errors import RequestError
from skipkernels.executors import Executor
from skipkernels.model.text import TextStream
from skipkernels.program.state import DecodeState
from skipkernels.support.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row:
    """One prompt's progress: a view of its row of the state, and its text so far.

    A device may run ahead of what was looked at: the row's tokens here are those of the steps it was told of.
    """

    def __init__(
        self,
        state: DecodeState,
        index: int,
        prompt_tokens: int,
        tokenizer: PreTrainedTokenizerBase | None,
        stop: Sequence[str],
    ) -> None:
        self._state = state
        self.index = index
        self.prompt_tokens = prompt_tokens
        self.seconds: list[float] = []  # one entry per generated token
        self._text = TextStream(tokenizer, stop) if tokenizer is not None else None
        self._eos = {token for token in state.eos_token_ids[index].tolist() if token >= 0}
        self._taken = 0
        self._ended = False

    @property
    def running(self) -> bool:
        generated, active = self._state.progress[self.index].tolist()
        return not self._ended and (bool(active) or len(self.seconds) < generated)

    @property
    def token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self._state.token_ids[self.index, self.prompt_tokens :][: len(self.seconds)].tolist()

    def end(self) -> None:
        self._ended = True
        self._state.end_row(self.index)

    def take_steps(self, step_seconds: Sequence[float]) -> None:
        """Counts steps of the executor; of those past the row's own end it knows nothing."""
        generated = int(self._state.progress[self.index, 0])
        if not self._ended:
            self.seconds += step_seconds[: generated - len(self.seconds)]

    def take_text(self) -> str:
        """Feeds new tokens to the text and ends the row at a stop string. Returns the text that became certain."""
        if self._text is None:
            return ""
        text = ""
        for token in self.token_ids[self._taken :]:
            self._taken += 1
            if token in self._eos:
                break
            text += self._text.push(token)
            if self._text.stopped:
                self.end()
                break
        return text

    def take_rest(self) -> str:
        """The text that was held back for a stop string or an incomplete character."""
        return self._text.flush() if self._text else ""

    def result(self, prefill_s: float) -> Generation:
        """The answer so far; called once the row has ended."""
        self.take_text()
        self.take_rest()
        token_ids, state, index = self.token_ids, self._state, self.index
        stopped = self._text is not None and self._text.stopped
        reason: FinishReason = "stop" if stopped else "eos" if token_ids[-1] in self._eos else "length"
        return Generation(
            token_ids=token_ids,
            text=self._text.text if self._text else "",
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            skip_map=np.asarray(state.run_map[index, : len(token_ids)].numpy() == 0),
            similarity_map=state.similarity_map[index, : len(token_ids)].numpy().copy(),
            time_to_first_token_s=prefill_s + self.seconds[0],
            seconds_per_token=self.seconds,
        )


class Decoding:
    """Rows in flight over one executor. A newer decoding of the same engine takes their places over; from then on
    this one cannot go on, and its end means nothing."""

    def __init__(self, executor: Executor, rows: list[Row], prefill_s: float, turns: Turns) -> None:
        self._executor = executor
        self._turns = turns
        self.rows = rows
        self._prefill_s = prefill_s
        self.taken_over = False

    @property
    def running(self) -> bool:
        self._refuse_taken_over()
        return any(row.running for row in self.rows)

    def step(self, max_steps: int) -> None:
        """Decodes up to ``max_steps`` tokens of every running row, in one call of the executor."""
        with self._turns.take():
            self._refuse_taken_over()
            step_seconds = self._executor.run(max_steps)
            for row in self.rows:
                row.take_steps(step_seconds)

    def steps(self) -> Iterator[None]:
        """Decodes token by token until no row runs; the device need not wait for the caller between two tokens.

        Whoever shares the engine with other threads looks at the rows inside the same turn as the step.
        """
        steps = self._executor.steps()
        while True:
            with self._turns.take():
                self._refuse_taken_over()
                seconds = next(steps, None)
                if seconds is None:
                    return
                for row in self.rows:
                    row.take_steps([seconds])
            yield
            if not self.running:
                return

    def end(self) -> None:
        with self._turns.take():
            if not self.taken_over:
                for row in self.rows:
                    row.end()

    def results(self) -> list[Generation]:
        with self._turns.take():
            self._refuse_taken_over()
            return [row.result(self._prefill_s) for row in self.rows]

    def _refuse_taken_over(self) -> None:
        if self.taken_over:
            raise RequestError("a newer request to this engine has taken this generation's place; use a second engine")
