"""RowScheduler: decides which token each row of the next step holds. It knows nothing of tensors, text or HTTP.

Every running sequence decodes in every step, and prompts come in by chunks that fill a fixed number of further rows,
so that a long prompt slows a stream down but never stops it (Sarathi-Serve's chunked prefill: Agrawal et al., OSDI
2024, arXiv 2403.02310). Sequences are admitted while there are blocks for the tokens they have, not for the longest
answer they could give; when blocks run out, the last-admitted sequence gives its own back and is recomputed later
(PagedAttention: Kwon et al., SOSP 2023, arXiv 2309.06180).

Why no sequence starves: sequences are admitted in the order of arrival; the last one admitted is preempted first and
goes back to the head of the queue. So the oldest sequence that has not ended always runs and is never preempted. Prompt
rows go to the earliest deadline first, but a share of them always to the oldest: each step takes it at least
``prompt_rows // OLDEST_SHARE`` prompt tokens or one new token further.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Tokens
from itertools import count

from skipkernels.decoding.block_pool import BlockPool
from skipkernels.decoding.block_tables import BlockTables
from skipkernels.decoding.prefix_index import PrefixIndex
from skipkernels.decoding.sequence import Sequence, Status
from skipkernels.decoding.step import DecodeRow, PromptChunk, Step
from skipkernels.errors import RequestError

OLDEST_SHARE = 4
"""The oldest prompt gets one in so many prompt rows, whoever has a deadline."""

LEAST_ROWS = 2
"""Of the prompt that comes first and of the oldest one, where there are as many and however dear they are."""


class RowScheduler:
    """``add`` and ``cancel`` sequences; ``plan`` a step, run it, and ``commit`` it, or ``abandon`` it where it failed.
    Not for use from two threads at once.

    Args:
        slots: sequences that can decode at the same time.
        prompt_rows: further rows of a step, for prompts.
        pool, index: the cache's blocks; nobody else takes any.
        max_seq_len: positions one sequence may have.
        watermark: blocks to leave for the growth of running sequences when another one is admitted, so that it need
            not be preempted at once; None: a hundredth of the pool.
    """

    def __init__(
        self,
        slots: int,
        prompt_rows: int,
        pool: BlockPool,
        index: PrefixIndex,
        max_seq_len: int,
        *,
        watermark: int | None = None,
    ) -> None:
        for name, value in (("slots", slots), ("prompt_rows", prompt_rows), ("max_seq_len", max_seq_len)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}")
        self.prompt_rows = prompt_rows
        self.row_growth = 0.0
        """A prompt row counts for 1 and this for every position before it."""
        self.max_seq_len = max_seq_len
        self._pool = pool
        self._tables = BlockTables(pool, index)
        self._watermark = max(1, pool.num_blocks // 100) if watermark is None else watermark
        self._arrivals = count()
        self._waiting: deque[Sequence] = deque()  # by arrival: preempted sequences came before those never admitted
        self._running: list[Sequence] = []  # by admission, which is by arrival too
        self._free_slots = list(range(slots))  # a heap: the lowest is taken first
        self._planned: Step | None = None
        self.prefix_hits = self.prefix_queries = self.preemptions = 0  # tokens, tokens, sequences

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def check(self, sequence: Sequence) -> None:
        """Sets a sequence's ``max_tokens``, the length at which it ends; safe to call from any thread.

        Raises:
            RequestError: it could not be served even if it were alone.
        """
        sequence.max_tokens = self._max_tokens(sequence)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence and sets its ``max_tokens``, the length at which it ends.

        Raises:
            RequestError: it was added before, or could not be served even if it were alone.
        """
        if sequence.arrival is not None:
            raise RequestError(f"this sequence was added before and is {sequence.status}; make a new one")
        self.check(sequence)
        sequence.arrival = next(self._arrivals)
        self._waiting.append(sequence)

    def cancel(self, sequence: Sequence) -> None:
        """Ends a sequence and releases all it holds.

        Also between ``plan`` and ``commit``: what the running step still writes for the sequence goes to blocks and a
        slot that nobody else gets before the next ``plan``.

        Raises:
            RequestError: it has ended already, or was never added here.
        """
        if sequence.status.ended:
            raise RequestError(f"this sequence has ended ({sequence.status}); it cannot be cancelled")
        if sequence in self._running:
            self._vacate(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        else:
            raise RequestError("this sequence was not added to this scheduler, which can cancel its own only")
        sequence.status = Status.CANCELLED

    def plan(self, wish: int = 1) -> Step:
        """Fills the rows of the next step.

        Args:
            wish: decode steps to run at once; ``Step.max_steps`` says how many can be. Blocks for them are taken at
                once, if need be from those the prefix index keeps.
        """
        if wish < 1:
            raise RequestError(f"wish must be at least 1 step, got {wish}")
        assert self._planned is None, "a step is planned already; commit or abandon it first"
        preempted = self._make_room()
        # a sequence just preempted for want of blocks must not come back in the same step
        admitted = [] if preempted else self._admit()
        chunks, decode_rows = self._fill_rows()
        max_steps = self._look_ahead(wish)
        self._planned = Step(
            preempted=tuple(preempted),
            copies=self._tables.take_copies(),
            block_tables=self._tables.take_changed(),
            admitted=tuple(admitted),
            chunks=tuple(chunks),
            decode_rows=tuple(decode_rows),
            max_steps=max_steps,
        )
        return self._planned

    def commit(
        self, step: Step, generated: Mapping[int, Tokens[int]], ended: Collection[int] = ()
    ) -> tuple[Sequence, ...]:
        """Records what a step has done, and returns the sequences that have finished.

        Args:
            generated: new tokens by slot, one for each decode step that ran; those of cancelled sequences are ignored.
            ended: slots whose sequence ends here, by an end-of-sequence token or a stop string. A sequence that has
                reached its ``max_tokens`` ends without being named.
        """
        self._end_step(step)
        for chunk in step.chunks:
            if chunk.sequence.status is Status.RUNNING:
                chunk.sequence.num_cached = chunk.end
        finished = []
        for row in step.decode_rows:
            sequence = row.sequence
            if sequence.status is Status.RUNNING:
                if generated[row.slot] or row.slot not in ended:  # one that ended may have got nothing in this step
                    self._append(sequence, generated[row.slot])
                if row.slot in ended or sequence.num_tokens == sequence.max_tokens:
                    finished.append(sequence)
        for sequence in self._running:
            self._tables.index_full(sequence)
            self._tables.return_unused(sequence)
        for sequence in finished:
            self._vacate(sequence)
            sequence.status = Status.FINISHED
        return tuple(finished)

    def abandon(self, step: Step) -> None:
        """The step failed and nobody knows what it has written: every running sequence goes back to the queue and is
        recomputed. No token is lost; blocks in the prefix index were complete before the step."""
        self._end_step(step)
        self.reset()

    def reset(self) -> None:
        """As ``abandon``, also where planning itself was broken off."""
        self._planned = None
        while self._running:
            self._preempt_last()
        self._tables.take_copies()
        self._tables.take_changed()

    def _make_room(self) -> list[tuple[int, Sequence]]:
        """A block to write to for every decoding sequence, by arrival. Returns (slot, sequence) of those preempted."""
        preempted = []
        for sequence in list(self._running):
            while sequence.decoding and not self._tables.prepare_write(sequence):
                preempted.append(self._preempt_last())  # perhaps this very sequence
        return preempted

    def _admit(self) -> list[Sequence]:
        """First come, first served: a sequence there is no room for is not overtaken."""
        admitted = []
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            if not self._tables.place(sequence, self._free_slots[0], self._reserve(sequence)):
                break
            heapq.heappop(self._free_slots)
            self._waiting.popleft()
            sequence.status = Status.RUNNING
            self._running.append(sequence)
            admitted.append(sequence)
            self.prefix_queries += sequence.num_tokens
            self.prefix_hits += sequence.num_cached
        return admitted

    def _reserve(self, newcomer: Sequence) -> int:
        """Blocks to leave when ``newcomer`` is admitted: no more than can still be asked for."""
        if not self._running:
            return 0
        return min(self._watermark, sum(self._tables.growth(sequence) for sequence in (*self._running, newcomer)))

    def _fill_rows(self) -> tuple[list[PromptChunk], list[DecodeRow]]:
        """Prompt rows by deadline while there are any; a decode row for each sequence whose prompt needs no more."""
        chunks: list[PromptChunk] = []
        decode_rows: list[DecodeRow] = []
        prompts = [sequence for sequence in self._running if not sequence.decoding]
        granted: dict[Sequence, int] = {}
        free_rows, free = self.prompt_rows, float(self.prompt_rows)  # rows, and what they may count for
        kept = max(1, free_rows // OLDEST_SHARE)
        for sequence in sorted(prompts, key=lambda sequence: sequence.deadline):
            if free_rows:
                self._tables.adopt_filled(sequence)
            oldest = prompts[0]
            reserve = 0 if oldest in granted or sequence is oldest else min(kept, oldest.num_prompt_rows)
            counts = 1.0 + self.row_growth * sequence.num_cached
            afforded = int((free - reserve) / counts)
            if not granted or sequence is oldest:  # however long it is, it gets on
                afforded = max(afforded, LEAST_ROWS)
            granted[sequence] = rows = max(0, min(sequence.num_prompt_rows, free_rows - reserve, afforded))
            free_rows -= rows
            free -= rows * counts
        for sequence in self._running:
            assert sequence.slot is not None
            start, missing = sequence.num_cached, sequence.num_prompt_rows
            rows = granted.get(sequence, 0)
            if rows:
                chunks.append(PromptChunk(sequence.slot, sequence, start, start + rows))
            if rows == missing:
                decode_rows.append(DecodeRow(sequence.slot, sequence, starts=not sequence.decoding))
                sequence.decoding = True
        return chunks, decode_rows

    def _look_ahead(self, wish: int) -> int:
        """How many decode steps can follow one another, up to ``wish``."""
        if not self._running or not all(sequence.decoding for sequence in self._running):
            return 1  # a prompt waits for the rows of the next step
        left = [sequence.max_tokens - sequence.num_tokens for sequence in self._running]
        # a waiting sequence may come in when the first one ends
        return self._tables.take_ahead(self._running, min(wish, min(left) if self._waiting else max(left)))

    def _end_step(self, step: Step) -> None:
        assert step is self._planned, "this is not the step that was planned last"
        self._planned = None

    def _append(self, sequence: Sequence, tokens: Tokens[int]) -> None:
        """A device may have decoded some steps more than were planned, as far as there are blocks."""
        room = len(sequence.blocks) * self._pool.block_size - sequence.num_cached
        limit = min(room, sequence.max_tokens - sequence.num_tokens)
        assert 1 <= len(tokens) <= limit, f"slot {sequence.slot}: {len(tokens)} new tokens, expected 1 to {limit}"
        sequence.tokens.extend(tokens)
        sequence.num_cached += len(tokens)

    def _preempt_last(self) -> tuple[int, Sequence]:
        """Sends the last-admitted sequence back to the head of the queue; returns the slot it had, and itself."""
        sequence = self._running[-1]
        slot = self._vacate(sequence)
        sequence.status = Status.PREEMPTED
        self.preemptions += 1
        self._waiting.appendleft(sequence)
        return slot, sequence

    def _vacate(self, sequence: Sequence) -> int:
        """Takes a running sequence's blocks and slot away; returns the slot."""
        assert sequence.slot is not None
        slot = sequence.slot
        self._tables.release(sequence)
        self._running.remove(sequence)
        heapq.heappush(self._free_slots, slot)
        sequence.decoding = False
        return slot

    def _max_tokens(self, sequence: Sequence) -> int:
        """Tokens a sequence may come to have, of which the last is not cached."""
        tokens, new = sequence.num_prompt_tokens, sequence.max_new_tokens
        if tokens > self.max_seq_len:
            raise RequestError(
                f"the prompt has {tokens} tokens, the cache holds max_seq_len={self.max_seq_len}; "
                "shorten it or load the engine with a larger max_seq_len"
            )
        self._check_pool(f"the prompt has {tokens} tokens", tokens, "shorten it")
        room = min(self.max_seq_len, self._pool.num_blocks * self._pool.block_size) + 1 - tokens
        if new is None:
            return tokens + room
        if tokens + new - 1 > self.max_seq_len:
            raise RequestError(
                f"max_new_tokens={new} does not fit: {tokens} prompt tokens leave room for "
                f"{self.max_seq_len + 1 - tokens} in max_seq_len={self.max_seq_len}"
            )
        asked = f"a prompt of {tokens} tokens with max_new_tokens={new}"
        self._check_pool(asked, tokens + new - 1, f"ask for {room} new tokens at most")
        return tokens + new

    def _check_pool(self, what: str, positions: int, remedy: str) -> None:
        pool = self._pool
        needed = pool.blocks_for(positions)
        if needed > pool.num_blocks:
            raise RequestError(
                f"{what}: {pool.describe(needed)} needed, the whole cache holds {pool.describe(pool.num_blocks)}; "
                f"{remedy} or give the cache more memory"
            )
