"""Handle: one request in flight, as the one who made it sees it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from skipkernels.decoding.generation import FinishReason, Generation, StreamChunk, TokenLogprob
from skipkernels.decoding.request import Request
from skipkernels.decoding.run_record import RunRecord
from skipkernels.decoding.sequence import Sequence as TokenSequence
from skipkernels.errors import RequestError
from skipkernels.model.text import TextStream
from skipkernels.skipping.policy import GatePlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Driver(Protocol):
    """What runs the steps a handle waits for."""

    def advance(self, handle: Handle) -> None:
        """Returns once the handle has a chunk that nobody has taken, or has ended."""
        ...

    def finish(self, handles: Collection[Handle]) -> None:
        """Returns once the handles have ended."""
        ...

    def cancel(self, handle: Handle, *, ended_ok: bool = False) -> None: ...

    def set_plan(self, handle: Handle, plan: GatePlan | None) -> None: ...

    def stop(self, handle: Handle, *, ended_ok: bool = False) -> None: ...


class Handle:
    """The answer to one request while it comes: iterate over its chunks, or wait for ``result()``.

    There is no thread behind it: whoever waits runs the engine's steps, which decode for every request in flight. Any
    number of threads may wait for handles of one engine.
    """

    def __init__(self, driver: Driver, request: Request, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.request = request
        self.sequence = TokenSequence(
            request.token_ids,
            max_new_tokens=request.max_new_tokens,
            policy_identity=request.policy_identity,
            embedded=request.embedded,
            deadline=request.deadline,
        )
        self.plan = request.plan  # the skip policy now: ``set_policy`` changes it
        self.token_ids: list[int] = []  # generated so far
        self.seconds: list[float] = []  # one entry for each
        self.logprobs: list[TokenLogprob] = []  # one entry for each, where they were asked
        self.runs = RunRecord()
        self.streamed = bool(request.stop)  # somebody looks at every token as it comes
        self._driver = driver
        self._text = TextStream(tokenizer, request.stop) if tokenizer is not None else None
        self._chunks: deque[StreamChunk] = deque()
        self._read = 0  # tokens whose text was taken
        self._started = time.perf_counter()
        self._first_token_s = 0.0
        self._ended = False
        self._generation: Generation | None = None
        self._error: RequestError | None = None

    def __iter__(self) -> Iterator[StreamChunk]:
        """A chunk for each token as it comes; the last one carries the whole ``generation``. A handle whose iteration
        is given up is cancelled.

        Raises:
            RequestError: the request was cancelled.
        """
        self.streamed = True
        try:
            while True:
                self._driver.advance(self)
                while self._chunks:
                    yield self._chunks.popleft()
                if self._error:
                    raise self._error
                if self._generation:
                    return
        finally:
            self.cancel(ended_ok=True)

    def result(self) -> Generation:
        """Waits for the whole answer.

        Raises:
            RequestError: the request was cancelled.
        """
        self._driver.finish([self])
        if self._error:
            raise self._error
        assert self._generation is not None
        return self._generation

    def cancel(self, *, ended_ok: bool = False) -> None:
        """Ends the request between two steps and frees all it holds.

        Raises:
            RequestError: it has ended already, and that is not ``ended_ok``.
        """
        self._driver.cancel(self, ended_ok=ended_ok)

    def stop(self, *, ended_ok: bool = False) -> None:
        """Ends the answer where it is; ``result()`` is what was generated.

        Raises:
            RequestError: it has ended already, and that is not ``ended_ok``.
        """
        self._driver.stop(self, ended_ok=ended_ok)

    def set_plan(self, plan: GatePlan | None) -> None:
        """Another skip policy for the tokens still to come; nothing where the answer has ended."""
        self._driver.set_plan(self, plan)

    @property
    def running(self) -> bool:
        """Whether more is to come."""
        return self._generation is None and self._error is None

    @property
    def prompt_tokens(self) -> int:
        return self.sequence.num_prompt_tokens

    # what the decode loop does, under its lock

    @property
    def has_news(self) -> bool:
        return bool(self._chunks) or not self.running

    @property
    def ended(self) -> bool:
        """The last token was handed over; nothing that the device still decodes belongs to it."""
        return self._ended

    def take(self, token_ids: Sequence[int], seconds: Sequence[float], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """Tokens of the next steps and how long each took."""
        self.logprobs += logprobs
        if (grammar := self.request.sampling.grammar) is not None:
            for token in token_ids:
                if token not in self.request.eos_token_ids:
                    grammar.accept(token)
        if not self.token_ids and token_ids:
            self._first_token_s = time.perf_counter() - self._started
        self.token_ids += token_ids
        self.seconds += seconds
        if self.request.stop:
            self.read()

    def read(self) -> None:
        """Makes chunks of the tokens that were handed over. A stop string ends the answer at the token that completes
        it."""
        for token in self.token_ids[self._read :]:
            self._read += 1
            text = "" if self._text is None or token in self.request.eos_token_ids else self._text.push(token)
            logprob = self.logprobs[self._read - 1] if self.logprobs else None
            self._chunks.append(StreamChunk(text, token, logprob=logprob))
            if self._text is not None and self._text.stopped:
                del self.token_ids[self._read :], self.seconds[self._read :], self.logprobs[self._read :]
                self._ended = True
                return

    def take_chunks(self) -> list[StreamChunk]:
        """The chunks that have come since the last call, without waiting. For whoever runs the steps: the last one
        carries the ``generation``.

        Raises:
            RequestError: the request was cancelled.
        """
        if self.running:
            self.read()
        if self._error:
            raise self._error
        chunks = list(self._chunks)
        self._chunks.clear()
        return chunks

    def end(self) -> None:
        """No further token is taken."""
        self._ended = True

    def finish(self) -> None:
        """The answer is complete, its runs recorded."""
        self._ended = True
        self.read()
        rest = self._text.flush() if self._text else ""
        self._generation = self._result()
        self._chunks.append(StreamChunk(rest, None, self._generation))

    def fail(self, error: RequestError) -> None:
        self._ended = True
        self._error = error

    def _result(self) -> Generation:
        stopped = self._text is not None and self._text.stopped
        ended = bool(self.token_ids) and self.token_ids[-1] in self.request.eos_token_ids
        reason: FinishReason = "stop" if stopped or ended else "length"
        run_map, similarity_map = self.runs.run_map, self.runs.similarity_map
        return Generation(
            token_ids=list(self.token_ids),
            text=self._text.text if self._text else "",
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            skip_map=run_map.numpy() == 0,
            similarity_map=similarity_map.numpy().copy(),
            unread_map=self.runs.unread_map.numpy(),
            time_to_first_token_s=self._first_token_s,
            seconds_per_token=list(self.seconds),
            logprobs=None if self.request.sampling.logprobs is None else list(self.logprobs),
        )
