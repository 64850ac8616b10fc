"""The answers of one batch while their tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from skipkernels.chat.chat import Completion
from skipkernels.chat.progress import Progress, progress_of
from skipkernels.decoding.generation import SamplingParams
from skipkernels.decoding.handle import Handle
from skipkernels.engine import Engine, Prompt
from skipkernels.modality.strategy import Inputs
from skipkernels.model.text import TextStream
from skipkernels.skipping.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Asked(Protocol):
    """What the ``text`` modality of a request says of its answer, whatever else it holds."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def sampling(self) -> SamplingParams: ...
    @property
    def stop(self) -> tuple[str, ...]: ...


def complete(engine: Engine, policy: Policy, batch: Sequence[Inputs], prompts: Sequence[Prompt]) -> list[Completion]:
    """Decodes the prompts of a batch together, as each request's ``text`` asks, and reports its progress."""
    assert engine.tokenizer is not None, "an engine for chats has a tokenizer"
    asked: list[Asked] = [inputs["text"] for inputs in batch]
    decoding = engine.begin(prompts, sampling=[prompt.sampling for prompt in asked], policy=policy)
    eos = frozenset(engine.default_eos_token_ids)
    replies = [
        _Reply(row, prompt, progress_of(inputs), engine.tokenizer, eos)
        for row, prompt, inputs in zip(decoding.rows, asked, batch, strict=True)
    ]
    try:
        for _ in decoding.steps():
            for reply in replies:
                reply.take()
    finally:
        decoding.end()
    return [reply.completion() for reply in replies]


class _Reply:
    """One row's text while it comes."""

    def __init__(
        self,
        row: Handle,
        prompt: Asked,
        progress: Progress,
        tokenizer: PreTrainedTokenizerBase,
        eos: frozenset[int],
    ) -> None:
        self.tokens = 0
        self._row = row
        self._limit = prompt.max_new_tokens
        self._progress = progress
        self._eos = eos
        self._text = TextStream(tokenizer, prompt.stop)
        self._ended_by_itself = False
        progress.restart()

    def take(self) -> None:
        """Hands on what the row's new tokens say, and ends it where it has to end."""
        for token in self._row.token_ids[self.tokens :]:
            self.tokens += 1
            if token in self._eos:
                self._ended_by_itself = True
                return
            self._progress.add(self._text.push(token))
            self._ended_by_itself = self._text.stopped
            if self._text.stopped or self.tokens == self._limit:
                self._stop()
                return
        if self._progress.given_up:
            self._stop()

    def _stop(self) -> None:
        self._row.stop(ended_ok=True)

    def completion(self) -> Completion:
        self._progress.add(self._text.flush())
        left_out = self._row.runs.unread_map[: self.tokens]
        return Completion(
            text=self._text.text,
            finish_reason="stop" if self._ended_by_itself else "length",
            prompt_tokens=self._row.prompt_tokens,
            new_tokens=self.tokens,
            skip_ratio=float(left_out.mean()),
        )
