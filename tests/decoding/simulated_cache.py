"""A cache that is a dictionary, and a device that does what a step says over it: the scheduler's model.

Whatever a position's keys and values depend on (its token, all tokens before it, and for generated ones the policy and
where generation began) is condensed into one number. A row that reads its sequence's own numbers, and no other, would
have computed the right attention. The device goes by the step alone: by its copies, its tables and its rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

from skipkernels.decoding.block_pool import BlockPool
from skipkernels.decoding.prefix_index import PrefixIndex
from skipkernels.decoding.row_scheduler import RowScheduler
from skipkernels.decoding.sequence import Sequence, Status
from skipkernels.decoding.step import Step

BLOCK_BYTES = 512


class SimulatedCache:
    """A scheduler, its pool and its index, with the cache's contents beside them. ``run_step`` and ``check`` raise
    AssertionErrors that name the rule that was broken."""

    def __init__(
        self,
        *,
        slots: int = 3,
        prompt_rows: int = 5,
        num_blocks: int = 8,
        block_size: int = 4,
        max_seq_len: int = 26,
        scheduler: type[RowScheduler] = RowScheduler,
        index: type[PrefixIndex] = PrefixIndex,
    ) -> None:
        self.slots = slots
        self.pool = BlockPool(num_blocks, block_size, block_bytes=BLOCK_BYTES)
        self.index = index(self.pool)
        self.scheduler = scheduler(slots, prompt_rows, self.pool, self.index, max_seq_len)
        self.sequences: list[Sequence] = []  # that have not ended
        self.num_steps = 0
        self.sound = True  # no check has failed
        self._cache: dict[tuple[int, int], int] = {}  # (block, offset) -> content
        self._tables: dict[int, tuple[int, ...]] = {}  # by slot
        self._contents: dict[tuple[int, int, object], int] = {}  # (content before, token, written under) -> content
        self._expected: dict[Sequence, list[int]] = {}  # content of each position
        self._tokens: dict[Sequence, list[int]] = {}

    # requests

    def add(self, sequence: Sequence) -> Sequence:
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        self._expected[sequence], self._tokens[sequence] = [], list(sequence.tokens)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        self.scheduler.cancel(sequence)
        self._forget(sequence)
        assert sequence.status is Status.CANCELLED

    def run_step(
        self,
        token: Callable[[], int] = lambda: 0,
        *,
        wish: int = 1,
        ended: Callable[[Sequence], bool] = lambda sequence: False,
        in_flight: Callable[[], None] = lambda: None,
    ) -> Step:
        """Plans a step, runs and commits it. ``token`` draws the next token of a sequence, ``ended`` whether it ends
        a sequence; ``in_flight`` is called before the device has run."""
        self.sound = False
        oldest = self.sequences[0]
        step = self._plan(wish)
        before = oldest.num_cached
        in_flight()
        generated, ends = self._run(step, token, ended)
        finished = self.scheduler.commit(step, generated, ends)
        for sequence in finished:
            self._forget(sequence)
        assert oldest.status.ended or oldest.num_cached > before, "starving: the oldest sequence has not moved"
        self.num_steps += 1
        self.check()
        return step

    def fail_step(self) -> None:
        """A step breaks down half-way: what it was to write is lost or wrong."""
        step = self._plan(1)
        self._tables.update(step.block_tables)
        written = [(chunk.slot, position) for chunk in step.chunks for position in range(chunk.start, chunk.end)]
        for slot, position in written + [(row.slot, row.sequence.num_tokens - 1) for row in step.decode_rows]:
            self._cache[self._place(self._tables[slot], position)] = -1
        self.scheduler.abandon(step)
        self.check()

    def drain(self, token: Callable[[], int] = lambda: 0) -> None:
        while self.scheduler.has_work:
            self.run_step(token)

    # the device

    def _plan(self, wish: int) -> Step:
        decoding = [sequence for sequence in self.sequences if sequence.decoding]
        step = self.scheduler.plan(wish)
        rows = {row.sequence for row in step.decode_rows}
        preempted = {sequence for _, sequence in step.preempted}
        assert rows.issuperset(set(decoding) - preempted), "stalled: a decoding sequence has no row"
        assert not rows & preempted, "a preempted sequence has a row"
        assert step.num_prompt_rows <= self.scheduler.prompt_rows, "more prompt rows than there are"
        assert len({row.slot for row in step.decode_rows}) == len(step.decode_rows) <= self.slots
        assert 1 <= step.max_steps <= wish
        assert not step.empty or not self.scheduler.has_work, "idle: there is work and no row"
        return step

    def _run(
        self, step: Step, token: Callable[[], int], ended: Callable[[Sequence], bool]
    ) -> tuple[dict[int, list[int]], Collection[int]]:
        for source, destination in step.copies:
            for offset in range(self.pool.block_size):
                self._cache[destination, offset] = self._cache.get((source, offset), -1)
        self._tables.update(step.block_tables)
        for chunk in step.chunks:
            for position in range(chunk.start, chunk.end):
                self._write(chunk.slot, chunk.sequence, position)
        active = list(step.decode_rows)
        generated: dict[int, list[int]] = {row.slot: [] for row in active}
        ends = set()
        for done in range(step.max_steps):
            for row in active:
                self._write(row.slot, row.sequence, len(self._tokens[row.sequence]) - 1)
            for chunk in step.chunks if done == 0 else ():
                self._attend(chunk.slot, chunk.sequence, chunk.end)
            for row in list(active):
                tokens = self._tokens[row.sequence]
                self._attend(row.slot, row.sequence, len(tokens))
                tokens.append(token())
                generated[row.slot].append(tokens[-1])
                if ended(row.sequence):
                    ends.add(row.slot)
                if row.slot in ends or len(tokens) == row.sequence.max_tokens:
                    active.remove(row)
        return generated, ends

    def _write(self, slot: int, sequence: Sequence, position: int) -> None:
        block, offset = self._place(self._tables[slot], position)
        references = 0 if sequence.status is Status.CANCELLED else 1
        assert self.pool.references(block) == references, "written: a block in two hands, or in none"
        assert not self.pool.is_indexed(block), "written: a block the index promises to others"
        self._cache[block, offset] = self._content(sequence, position)

    def _attend(self, slot: int, sequence: Sequence, positions: int) -> None:
        for position in range(positions):
            held = self._cache.get(self._place(self._tables[slot], position))
            assert held == self._content(sequence, position), "read: keys and values of another past"

    def _place(self, table: tuple[int, ...] | list[int], position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.pool.block_size)
        assert index < len(table), "written: a position without a block"
        return table[index], offset

    def _content(self, sequence: Sequence, position: int) -> int:
        expected, tokens = self._expected[sequence], self._tokens[sequence]
        while len(expected) <= position:
            at = len(expected)
            generated = at >= sequence.num_prompt_tokens and sequence.policy_identity is not None
            under: object = (sequence.policy_identity, sequence.num_prompt_tokens) if generated else None
            if sequence.embedded is not None:
                under = sequence
            key = expected[-1] if expected else -1, tokens[at], under
            expected.append(self._contents.setdefault(key, len(self._contents)))
        return expected[position]

    def _forget(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        assert (sequence.slot, sequence.blocks) == (None, []), "leak: an ended sequence holds something"

    # what must always hold

    def check(self) -> None:
        self.sound = False
        running = [sequence for sequence in self.sequences if sequence.status is Status.RUNNING]
        waiting = [sequence for sequence in self.sequences if sequence.status is not Status.RUNNING]
        held = Counter(block for sequence in running for block in sequence.blocks)
        for block in range(self.pool.num_blocks):
            assert self.pool.references(block) == held[block], "leak: references that no sequence holds, or too few"
        idle = [b for b in range(self.pool.num_blocks) if not held[b] and self.pool.is_indexed(b)]
        assert self.pool.num_idle == len(idle)
        assert self.pool.num_used == len(held)
        assert self.pool.num_free == self.pool.num_blocks - len(held) - len(idle), "leak: a block is nowhere"
        slots = [sequence.slot for sequence in running]
        assert len({*slots, None}) == len(slots) + 1, "two sequences in a slot, or one in none"
        assert (len(running), len(waiting)) == (self.scheduler.num_running, self.scheduler.num_waiting)
        for sequence in waiting:
            assert (sequence.slot, sequence.blocks) == (None, []), "leak: a waiting sequence holds something"
        assert self.sequences == running + waiting, "order: a sequence was overtaken"
        for sequence in self.sequences:
            assert sequence.tokens == self._tokens[sequence], "lost: tokens are not what they were"
        for sequence in running:
            assert sequence.num_cached < sequence.num_tokens, "the newest token was not to be computed"
            for position in range(sequence.num_cached):
                held_content = self._cache.get(self._place(sequence.blocks, position))
                assert held_content == self._content(sequence, position), "read: keys and values of another past"
        self.sound = True

    def check_nothing_is_left(self) -> None:
        """After all sequences have ended: every block can be had again, and then the index is empty."""
        assert not self.scheduler.has_work
        assert self.pool.num_used == 0, "leak: blocks are held though every sequence has ended"
        blocks = self.pool.allocate(self.pool.num_blocks)
        assert sorted(blocks) == list(range(self.pool.num_blocks)), "leak: a block is nowhere"
        assert len(self.index) == 0, "the index promises blocks that are somebody's"
        for block in blocks:
            self.pool.release(block)
        assert self.pool.num_free == self.pool.num_blocks
