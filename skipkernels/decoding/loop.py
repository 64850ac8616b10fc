"""DecodeLoop: takes requests, plans steps, runs them, and hands their tokens out. Every generation goes through here.

submit(request) -> handle -> row scheduler -> rows of the state -> step (program) -> tokens -> handle
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from skipkernels.decoding.block_pool import BlockPool
from skipkernels.decoding.cache_status import CacheStatus
from skipkernels.decoding.generation import SamplingParams, TokenLogprob
from skipkernels.decoding.handle import Handle
from skipkernels.decoding.own_rows import OwnRows
from skipkernels.decoding.prefix_index import PrefixIndex
from skipkernels.decoding.prompt_rows import PromptRows
from skipkernels.decoding.request import Request
from skipkernels.decoding.row_budget import RowBudget
from skipkernels.decoding.row_scheduler import RowScheduler
from skipkernels.decoding.sequence import Sequence as TokenSequence
from skipkernels.decoding.step import DecodeRow, Step
from skipkernels.errors import RequestError
from skipkernels.executors import Executor
from skipkernels.executors.variants import Variants
from skipkernels.program.program import Variant
from skipkernels.program.state import (
    ADJUSTS_BIAS,
    ADJUSTS_COUNTS,
    ADJUSTS_MASK,
    ENDED,
    MAX_EOS,
    WAITS_FOR_BLOCK,
    DecodeState,
)
from skipkernels.skipping.policy import GatePlan
from skipkernels.support.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

STEPS_AT_ONCE = 16
"""Steps planned together where somebody looks at every token: planning costs some 0.1 ms of Python."""


@dataclass
class _Flight:
    """A planned step, or several, on its way through the executor."""

    step: Step
    streamed: bool  # somebody looks at every token
    handed: dict[int, int]  # by slot: num_generated when it was planned
    seconds: Generator[float] | None = None  # of each step, where it is streamed
    done: int = 0  # steps


class DecodeLoop:
    """Decodes for any number of requests at the same time; safe to use from several threads.

    Requests come in through ``submit`` at any time and take part from the next step on. There is no thread of its own:
    whoever waits for a handle runs steps, under one lock, and each step serves all that are in flight.
    """

    def __init__(
        self,
        state: DecodeState,
        prompt_rows: PromptRows,
        variants: Variants,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self._turns = Turns(on_gpu=state.active.is_cuda, on_fork=self._arrive_in_child)
        self.state = state
        block_bytes = state.cache_bytes() // state.num_blocks
        self.pool = BlockPool(state.num_blocks, state.block_size, block_bytes=block_bytes)
        self.index = PrefixIndex(self.pool)
        self.scheduler = RowScheduler(
            state.num_sequences, prompt_rows.capacity, self.pool, self.index, state.max_seq_len
        )
        self._prompt_rows = prompt_rows
        self._budget = RowBudget(prompt_rows.capacity)
        self._variants = variants
        self._tokenizer = tokenizer
        self._inbox: deque[Handle] = deque()
        self._handles: dict[TokenSequence, Handle] = {}  # in flight
        self._mask_words = np.zeros(state.token_mask.shape[1], dtype=np.int32)
        self._flight: _Flight | None = None
        self._running: Executor | None = None  # what is inside a long call now
        self._closed = False
        self.weights_may_change = False
        """The weights are a module's own, which its owner may change in place: nothing is kept between requests."""
        self._count = threading.Lock()
        self._wanted = 0  # callers that want to come between two steps
        self._waiting = 0  # callers that wait for a turn

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """Queues requests. Does not wait, not even for the step that runs now.

        Raises:
            RequestError: one of them could not be served even if it were alone, or the engine is closed; none is
                queued.
        """
        self._turns.check_process()  # what was in flight before a fork goes; this request stays
        if self._closed:
            raise RequestError("the engine is closed; load another one")
        handles = [Handle(self, request, self._tokenizer) for request in requests]
        for handle in handles:
            self.scheduler.check(handle.sequence)
        if self.weights_may_change and self.idle:
            self.forget_prefixes()
        self._inbox.extend(handles)
        if running := self._running:
            running.interrupt()
        return handles

    @property
    def idle(self) -> bool:
        """Nothing is in flight and nothing waits."""
        return not (self._inbox or self._handles)

    def cache_status(self) -> CacheStatus:
        """Roughly now: nobody is waited for."""
        pool, scheduler = self.pool, self.scheduler
        return CacheStatus(
            blocks=pool.num_blocks,
            used=pool.num_used,
            shared=pool.num_shared,
            idle=pool.num_idle,
            evictions=pool.evictions,
            prefix_hits=scheduler.prefix_hits,
            prefix_queries=scheduler.prefix_queries,
            preemptions=scheduler.preemptions,
        )

    def step(self, wish: int | None = None) -> bool:
        """Runs a step of every sequence in flight, or up to ``wish`` of them (None: as many as the answers may want)
        where nobody looks at single tokens. Returns whether there is more to do."""
        with self._turns.take():
            try:
                if self._flight is None:
                    self._take_inbox()
                    if not self.scheduler.has_work:
                        return False
                    self._flight = self._plan(wish)
                    self._take_off(self._flight)
                self._fly(self._flight)
            except BaseException:
                self._crash()
                raise
            return not self.idle

    def advance(self, handle: Handle) -> None:
        """Returns once ``handle`` has a chunk that nobody has taken, or has ended; runs steps until then."""
        while True:
            with self._turn():
                handle.read()
                if handle.has_news:
                    return
                self.step()

    def finish(self, handles: Collection[Handle]) -> None:
        """Returns once ``handles`` have ended; runs steps until then, as many in one call as nobody else waits for."""
        while any(handle.running for handle in handles):
            with self._turn():
                if any(handle.running for handle in handles):
                    alone = not self._inbox and all(handle in handles for handle in self._handles.values())
                    self.step(None if alone else STEPS_AT_ONCE)

    def cancel(self, handle: Handle, *, ended_ok: bool = False) -> None:
        """Ends a request between two steps and frees all it holds.

        Raises:
            RequestError: it has ended already, and that is not ``ended_ok``.
        """
        with self._between_steps():
            if not handle.running:
                if ended_ok:
                    return
                raise RequestError("this request has ended already; it cannot be cancelled")
            self._drop(handle)
            handle.fail(RequestError("this request was cancelled"))
            if self._flight is not None and self._must_plan(self._flight):
                self._land()  # the device is not to go on for nobody

    def stop(self, handle: Handle, *, ended_ok: bool = False) -> None:
        """Ends a request where it is: what was generated is its answer.

        Raises:
            RequestError: it has ended already, and that is not ``ended_ok``.
        """
        with self._between_steps():
            if not handle.running:
                if ended_ok:
                    return
                raise RequestError("this request has ended already; it cannot be stopped")
            handle.end()
            self._land()
            if handle.running:  # it was not decoding
                self._drop(handle)
                handle.finish()

    def set_plan(self, handle: Handle, plan: GatePlan | None) -> None:
        """Another skip policy from the next step on; None: no FFN is skipped. Nothing where the answer has ended."""
        with self._between_steps():
            if not handle.running or plan == handle.plan:
                return
            self._land()  # the program without gates may be in flight
            handle.plan = plan
            # blocks that are filled from now on were written under two policies
            handle.sequence.policy_identity = handle.request.own_identity
            slot = handle.sequence.slot
            if slot is not None and handle.sequence.decoding:
                self.state.set_policy(slot, plan)

    @contextmanager
    def _between_steps(self) -> Iterator[None]:
        """A turn that does not wait for more than the step that runs now."""
        self._turns.check_process()  # before anything is counted: a fork starts the counts anew
        with self._count:
            self._wanted += 1
        try:
            if running := self._running:
                running.interrupt()
            with self._turn():
                try:
                    yield
                except RequestError:  # refused, with nothing done
                    raise
                except BaseException:
                    self._crash()
                    raise
        finally:
            with self._count:
                self._wanted -= 1

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """A turn for one of several threads. The lock itself is not fair: who gives it back could take it again at
        once, for ever. So whoever comes sees who waits, and lets them go first."""
        self._turns.check_process()
        if self._waiting:
            time.sleep(1e-4)
        with self._count:
            self._waiting += 1
        waits = True
        try:
            with self._turns.take():
                with self._count:
                    self._waiting -= 1
                waits = False
                yield
        finally:
            if waits:
                with self._count:
                    self._waiting -= 1

    def _drop(self, handle: Handle) -> None:
        """Takes a request out, wherever it is."""
        if handle in self._inbox:
            self._inbox.remove(handle)
            return
        sequence = self._handles.pop(handle.sequence).sequence
        slot = sequence.slot
        if slot is not None and sequence.decoding:  # before that the slot knows nothing of this sequence
            self.state.end_sequence(slot)
            handle.runs.save(self.state, slot, len(handle.token_ids))
        self.scheduler.cancel(sequence)

    def close(self) -> None:
        """Cancels what is in flight; nothing can be submitted from then on."""
        self._closed = True
        with self._turns.take():
            self._land()
            for handle in [*self._inbox, *self._handles.values()]:
                self.cancel(handle, ended_ok=True)

    def forget_prefixes(self) -> None:
        """Empties the prefix index: the next prompts are computed whole."""
        with self._turns.take():
            self.index.clear()

    @contextmanager
    def own_rows(self) -> Iterator[OwnRows]:
        """The state and its cache for one user. Of what the prefix index knew, as much stays as the cache is larger
        than the rows.

        Raises:
            RequestError: requests are in flight.
        """
        with self._turns.take():
            if not self.idle:
                raise RequestError("requests are in flight; wait for them or cancel them first")
            if self.weights_may_change:
                self.index.clear()
            self._quiet()
            own = OwnRows(self.state, self._prompt_rows, self._variants[Variant()], self.pool, self.index)
            try:
                yield own
            finally:
                self._quiet()
                own.release()
                self.state.block_table.fill_(-1)

    def _arrive_in_child(self) -> None:
        """After a fork: what was in flight, and who waited for it, is the parent's."""
        self._count, self._wanted, self._waiting = threading.Lock(), 0, 0
        self._crash()
        for handle in [*self._inbox, *self._handles.values()]:
            self._drop(handle)
            handle.fail(RequestError("this request is in flight in the process that was forked; ask again here"))
        self._quiet()

    # one flight

    def _take_inbox(self) -> None:
        while self._inbox:
            handle = self._inbox[0]
            self.scheduler.add(handle.sequence)
            self._handles[handle.sequence] = handle
            self._inbox.popleft()

    def _plan(self, wish: int | None) -> _Flight:
        streamed = any(handle.streamed for handle in self._handles.values())
        if wish is None:
            wish = STEPS_AT_ONCE if streamed else self.state.max_seq_len
        if any(handle.request.sampling.grammar is not None for handle in self._handles.values()):
            wish = 1  # what may come next is known when the token before has come
        decoding = any(sequence.decoding for sequence in self._handles)
        self.scheduler.prompt_rows = self._budget.rows(decoding)
        self.scheduler.row_growth = self._budget.growth if decoding else 0.0
        step = self.scheduler.plan(wish)
        handed = {row.slot: row.sequence.num_generated for row in step.decode_rows}
        return _Flight(step, streamed, handed)

    def _take_off(self, flight: _Flight) -> None:
        """Sets the rows of the state to the step, and starts the executor on it."""
        state, step = self.state, flight.step
        assert not step.empty, "sequences are waiting and none has a row: the scheduler is stuck"
        for slot, sequence in step.preempted:
            logger.info("the cache is full: request %s waits and will be computed again", sequence.arrival)
            state.end_sequence(slot)
            handle = self._handles[sequence]
            handle.runs.save(state, slot, len(handle.token_ids))
        for source, target in step.copies:
            state.copy_block(source, target)
        for slot, blocks in step.block_tables:
            state.set_blocks(slot, blocks)
        for row in step.decode_rows:
            if row.starts:
                self._start(row)
            elif int(state.progress[row.slot, 1]) == WAITS_FOR_BLOCK:
                state.start_decoding(row.slot)
            if (grammar := self._handles[row.sequence].request.sampling.grammar) is not None:
                grammar.allow(self._mask_words)
                state.token_mask[row.slot] = torch.from_numpy(self._mask_words)
        self._prompt_rows.place([(chunk, self._handles[chunk.sequence].runs) for chunk in step.chunks])
        sequences = [row.sequence for row in step.decode_rows]
        # tokens that were generated with neurons left out are computed again so
        sequences += [chunk.sequence for chunk in step.chunks if chunk.end > chunk.sequence.num_prompt_tokens]
        handles = [self._handles[sequence] for sequence in sequences]
        executor = self._variants[Variant.for_plans(plan for one in handles for plan in (one.plan, one.request.plan))]
        if flight.streamed:
            flight.seconds = executor.steps(step.max_steps)
        self._running = executor

    def _start(self, row: DecodeRow) -> None:
        """Sets a slot's buffers up for a sequence that begins, or comes back after it was preempted."""
        handle, state, slot = self._handles[row.sequence], self.state, row.slot
        request = handle.request
        tokens = torch.tensor(row.sequence.tokens, dtype=torch.int32)
        state.begin_sequence(slot, tokens, row.sequence.num_generated)
        handle.runs.restore(state, slot)
        state.set_policy(slot, handle.plan)
        _set_sampling(state, slot, request.sampling)
        state.max_new_tokens[slot] = row.sequence.max_tokens - row.sequence.num_prompt_tokens
        eos = request.eos_token_ids
        for at in range(MAX_EOS):
            state.eos_token_ids[slot, at] = eos[at] if at < len(eos) else -1
        state.start_decoding(slot)

    def _fly(self, flight: _Flight) -> None:
        started = time.perf_counter()
        if flight.done == 0:
            self._prompt_rows.run()
        prefill_s = time.perf_counter() - started
        executor = self._running
        assert executor is not None
        if flight.seconds is not None:
            next_s = next(flight.seconds, None)
            seconds = [] if next_s is None else [next_s]
        else:
            seconds = executor.run(1 if self._inbox or self._wanted else flight.step.max_steps)
        if flight.done == 0:
            first_s = prefill_s + (seconds[0] if seconds else 0.0)
            step = flight.step
            self._budget.measured(step.num_prompt_rows, len(step.decode_rows), first_s, step.prompt_position)
        flight.done += max(1, len(seconds))
        self._hand_out(flight, seconds)
        if flight.seconds is None or not seconds or flight.done >= flight.step.max_steps or self._must_plan(flight):
            self._land()

    def _must_plan(self, flight: _Flight) -> bool:
        """Somebody waits for what only a new plan brings."""
        if self._inbox:
            return True
        ended = any(self._has_ended(row) for row in flight.step.decode_rows)
        return ended and (self.scheduler.num_waiting > 0 or all(map(self._has_ended, flight.step.decode_rows)))

    def _has_ended(self, row: DecodeRow) -> bool:
        handle = self._handles.get(row.sequence)
        return handle is None or handle.ended

    def _hand_out(self, flight: _Flight, seconds: list[float]) -> None:
        """Gives every handle the tokens it does not have yet."""
        state = self.state
        for row in flight.step.decode_rows:
            handle = self._handles.get(row.sequence)
            if handle is None or handle.ended:
                continue
            # in this order: a device that runs on writes both at once, and the last count comes with the end
            status = int(state.progress[row.slot, 1])
            generated = int(state.progress[row.slot, 0])
            had = len(handle.token_ids)
            begin = row.sequence.num_prompt_tokens + had
            new = state.token_ids[row.slot, begin : begin + generated - had].tolist()
            times = seconds[: len(new)]
            times += [seconds[-1] if seconds else 0.0] * (len(new) - len(times))
            if status == ENDED:
                handle.end()
            handle.take(new, times, _logprobs(state, row.slot, had, had + len(new), handle.request.sampling))
            if handle.ended:
                state.end_sequence(row.slot)
                self._finish(handle, row.slot)

    def _finish(self, handle: Handle, slot: int) -> None:
        handle.runs.save(self.state, slot, len(handle.token_ids))
        handle.finish()

    def _land(self) -> None:
        """Ends the flight: the device comes to rest, and the scheduler learns what was decoded."""
        flight, self._running = self._flight, None
        if flight is None:
            return
        if flight.seconds is not None:
            flight.seconds.close()
            self._hand_out(flight, [])
        generated: dict[int, list[int]] = {}
        ended: list[int] = []
        for row in flight.step.decode_rows:
            handle = self._handles.get(row.sequence)
            if handle is None:
                continue
            generated[row.slot] = handle.token_ids[flight.handed[row.slot] :]
            if handle.ended:
                ended.append(row.slot)
                if handle.running:
                    self.state.end_sequence(row.slot)
                    self._finish(handle, row.slot)
        finished = self.scheduler.commit(flight.step, generated, ended)
        self._flight = None
        for sequence in finished:
            del self._handles[sequence]

    def _crash(self) -> None:
        """A step failed: nobody knows what it has written. Its sequences keep the tokens that were handed out and are
        computed again."""
        flight, self._flight, self._running = self._flight, None, None
        if flight is None:  # planning was broken off; no step ran
            self.scheduler.reset()
            self._quiet()
            return
        self.state.settle()
        with suppress(Exception):  # the steps that did end, if that is not what failed
            self._hand_out(flight, [])
        for row in flight.step.decode_rows:
            handle = self._handles.get(row.sequence)
            if handle is None:
                continue
            row.sequence.tokens += handle.token_ids[row.sequence.num_generated :]
            if handle.ended or row.sequence.num_tokens >= row.sequence.max_tokens:
                self.scheduler.cancel(row.sequence)
                del self._handles[row.sequence]
                if handle.running:
                    handle.fail(RequestError("the end of this answer could not be made; ask again"))
            elif not row.starts or len(handle.token_ids) > flight.handed[row.slot]:
                # a slot that was just set up, or was about to be, knows nothing new
                handle.runs.save(self.state, row.slot, len(handle.token_ids))
        self.scheduler.abandon(flight.step)
        self._quiet()

    def _quiet(self) -> None:
        """No row is active, no sequence has begun."""
        self.state.settle()
        self.state.active.zero_()
        self.state.run_ffn.zero_()
        self.state.progress.zero_()


_OWN_BUFFERS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "seed",
)
"""Fields of ``SamplingParams`` that are a buffer of the state each."""


def _set_sampling(state: DecodeState, slot: int, sampling: SamplingParams) -> None:
    for name in _OWN_BUFFERS:
        getattr(state, name)[slot] = getattr(sampling, name)
    counts = sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
    mask = sampling.grammar is not None
    state.adjusts[slot] = ADJUSTS_BIAS * bool(sampling.logit_bias) + ADJUSTS_COUNTS * counts + ADJUSTS_MASK * mask
    if sampling.logit_bias:
        state.logit_bias[slot].zero_()
        for token, bias in sampling.logit_bias:
            state.logit_bias[slot, token] = bias
    state.num_logprobs[slot] = 0 if sampling.logprobs is None else 1 + sampling.logprobs


def _logprobs(state: DecodeState, slot: int, begin: int, end: int, sampling: SamplingParams) -> list[TokenLogprob]:
    """Of the tokens generated as number ``begin`` to ``end``, where they were asked."""
    if sampling.logprobs is None:
        return []
    count = sampling.logprobs
    values = state.logprobs[slot, begin:end].tolist()
    tokens = state.top_tokens[slot, begin:end].tolist()
    return [
        TokenLogprob(own[0], tuple(zip(top[:count], own[1 : 1 + count], strict=True)))
        for own, top in zip(values, tokens, strict=True)
    ]
