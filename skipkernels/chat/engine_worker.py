"""Runs requests on one engine, which join and leave its steps at any time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, Protocol

from skipkernels.chat.chat import Completion
from skipkernels.chat.grammar import Grammars
from skipkernels.chat.progress import progress_of
from skipkernels.decoding.generation import Generation
from skipkernels.decoding.handle import Handle
from skipkernels.decoding.loop import STEPS_AT_ONCE
from skipkernels.engine import Engine, Prompt
from skipkernels.errors import RequestError
from skipkernels.modality.errors import JobFailed
from skipkernels.modality.strategy import Inputs, Strategy
from skipkernels.skipping.policy import Policy


class EngineModel(Protocol):
    """A ``ChatModel`` on an engine."""

    device: str

    @property
    def engine(self) -> Engine: ...

    def prompt(self, inputs: Inputs, strategy: Strategy) -> Prompt:
        """What the engine decodes from; encodes what has to be encoded."""
        ...

    def policy(self, strategy: Strategy) -> Policy: ...


def submit(model: EngineModel, inputs: Inputs, strategy: Strategy, **changed: Any) -> Handle:
    """The request on the model's engine. ``changed``: arguments of ``Engine.submit`` in place of what it asks for."""
    asked = inputs["text"]
    wanted = {
        "max_new_tokens": asked.max_new_tokens,
        "sampling": asked.sampling,
        "stop": asked.stop,
        "eos_token_ids": asked.eos_token_ids,
        "policy": model.policy(strategy),
    }
    handle = model.engine.submit(model.prompt(inputs, strategy), **(wanted | changed))
    handle.streamed = True
    return handle


class EngineWorker:
    """A ``SlotWorker``: one thread runs the engine's steps, another one makes prompts, so that encoding a picture does
    not hold the steps up."""

    def __init__(self, model: EngineModel) -> None:
        self.slots = model.engine.max_batch_size
        self._model = model
        self._engine = engine = model.engine
        assert engine.tokenizer is not None, "an engine for chats has a tokenizer"
        self._grammars = Grammars(engine.tokenizer, engine.config.vocab_size, tuple(engine.default_eos_token_ids))
        self._replies: dict[int, _Reply] = {}  # by the identity of the inputs
        self._changed = threading.Condition()  # guards what is above and below
        self._closing = False
        self._steps = threading.Thread(target=self._run_steps, name=f"skipkernels-{model.device}", daemon=True)
        self._prompts = ThreadPoolExecutor(1, thread_name_prefix="skipkernels-prompts")

    async def answer(self, inputs: Inputs, strategy: Strategy, deadline_ms: float) -> Completion:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Completion] = loop.create_future()

        def settle(outcome: Completion | Exception) -> None:
            if done.cancelled():
                return
            if isinstance(outcome, Exception):
                done.set_exception(outcome)
            else:
                done.set_result(outcome)

        def settle_soon(outcome: Completion | Exception) -> None:
            loop.call_soon_threadsafe(settle, outcome)

        await loop.run_in_executor(self._prompts, self._begin, inputs, strategy, deadline_ms, settle_soon)
        return await done

    def move(self, inputs: Inputs, strategy: Strategy) -> None:
        self._wish(inputs, lambda reply: reply.move(self._model.policy(strategy)))

    def drop(self, inputs: Inputs) -> None:
        self._wish(inputs, _Reply.drop)

    async def recover(self) -> None:
        """Nothing to do: threads are never lost."""

    async def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._prompts.shutdown()
        if self._steps.ident is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._steps.join)

    def _wish(self, inputs: Inputs, wish: Callable[[_Reply], None]) -> None:
        """Left for the thread that runs the steps: nobody waits for one here."""
        with self._changed:
            if reply := self._replies.get(id(inputs)):
                reply.wishes.append(wish)

    def _begin(self, inputs: Inputs, strategy: Strategy, deadline_ms: float, settle: _Settle) -> None:
        progress = progress_of(inputs)
        progress.restart()
        asked = inputs["text"]
        sampling = asked.sampling
        if asked.grammar is not None:  # each answer goes its own way through it
            sampling = replace(sampling, grammar=self._grammars.grammar(asked.grammar))
        handle = submit(self._model, inputs, strategy, sampling=sampling, deadline=deadline_ms)
        with self._changed:
            self._replies[id(inputs)] = _Reply(self._engine, handle, inputs, settle)
            if self._steps.ident is None:
                self._steps.start()
            self._changed.notify()

    def _run_steps(self) -> None:
        while replies := self._next_replies():
            try:
                self._engine.loop.step(STEPS_AT_ONCE)
            except Exception as error:  # of the engine; the requests are tried again by themselves
                for key, reply in replies:
                    reply.fail(error)
                    self._forget(key)
                continue
            for key, reply in replies:
                if reply.take():
                    self._forget(key)

    def _next_replies(self) -> list[tuple[int, _Reply]]:
        """Waits for some; none: the end has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._replies or self._closing)
            return list(self._replies.items())

    def _forget(self, key: int) -> None:
        with self._changed:
            del self._replies[key]


_Settle = Callable[[Completion | Exception], None]


class _Reply:
    """One answer while it comes."""

    def __init__(self, engine: Engine, handle: Handle, inputs: Inputs, settle: _Settle) -> None:
        self.wishes: list[Callable[[_Reply], None]] = []
        self._engine = engine
        self._handle = handle
        self._inputs = inputs  # kept: their identity is the key
        self._progress = progress_of(inputs)
        self._settle = settle
        self._token_times: list[float] = []

    def move(self, policy: Policy) -> None:
        self._handle.set_plan(self._engine.plan_of(policy))

    def drop(self) -> None:
        self._handle.stop(ended_ok=True)

    def take(self) -> bool:
        """Does what was wished, and hands on what has come. Returns whether that was all."""
        try:
            while self.wishes:
                self.wishes.pop(0)(self)
            if self._progress.given_up:
                self.drop()
            for chunk in self._handle.take_chunks():
                if chunk.token_id is not None:
                    self._token_times.append(time.perf_counter())
                told = [] if chunk.logprob is None or chunk.token_id is None else [(chunk.token_id, chunk.logprob)]
                if chunk.text or told:
                    self._progress.add(chunk.text, told)
                if chunk.generation is not None:
                    self._settle(self._completion(chunk.generation))
                    return True
        except Exception as error:
            self.fail(error)
            return True
        return False

    def fail(self, error: Exception) -> None:
        """A ``RequestError`` is the request's own; any other is the engine's."""
        self._handle.cancel(ended_ok=True)
        if isinstance(error, RequestError):
            self._settle(error)
            return
        failure = JobFailed(f"the engine failed: {error!r}")
        failure.__cause__ = error
        self._settle(failure)

    def _completion(self, generation: Generation) -> Completion:
        times = self._token_times
        return Completion(
            text=generation.text,
            finish_reason=generation.finish_reason,
            prompt_tokens=generation.prompt_tokens,
            new_tokens=len(generation.token_ids),
            skip_ratio=generation.unread_ratio,
            token_ids=tuple(generation.token_ids),
            logprobs=None if generation.logprobs is None else tuple(generation.logprobs),
            after_first_ms=(times[-1] - times[0]) * 1e3 if times else None,
            gaps_ms=tuple((later - earlier) * 1e3 for earlier, later in pairwise(times)),
            bytes_not_read=round(float(generation.unread_map.sum()) * self._engine.weights.ffn_nbytes()),
        )
