"""BlockTables: the blocks of the running sequences, and all that happens to them between two steps.

The scheduler decides whose turn it is; here it is worked out what that takes: blocks found in the prefix index, fresh
ones, and a copy where a sequence would write to a block that others can read (copy on write, as in PagedAttention:
Kwon et al., SOSP 2023, arXiv 2309.06180).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable

from skipkernels.decoding.block_pool import BlockPool
from skipkernels.decoding.prefix_index import PrefixIndex
from skipkernels.decoding.sequence import Sequence


class BlockTables:
    """Gives sequences their blocks and takes them back; keeps ``blocks``, ``num_cached`` and ``num_indexed`` of each.

    Changes are collected until ``take_copies`` and ``take_changed`` are called.
    """

    def __init__(self, pool: BlockPool, index: PrefixIndex) -> None:
        self._pool = pool
        self._index = index
        self._copies: list[tuple[int, int]] = []
        self._changed: dict[int, Sequence] = {}  # by slot

    def take_copies(self) -> tuple[tuple[int, int], ...]:
        """(source, destination) of the copies to make, in their order."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def take_changed(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(slot, blocks) of the tables that are not what they were."""
        changed, self._changed = self._changed, {}
        return tuple((slot, tuple(sequence.blocks)) for slot, sequence in sorted(changed.items()))

    # admission

    def place(self, sequence: Sequence, slot: int, reserve: int) -> bool:
        """Gives a sequence blocks for all its tokens, those found in the index first. False, and nothing is done,
        when that would leave fewer than ``reserve`` blocks.

        The newest token is never taken as cached: its logits are wanted. Where its position lies in a block that was
        found, it is written to a copy.
        """
        pool = self._pool
        hits = self._index.match(sequence.block_keys(pool.block_size))
        missing = pool.blocks_for(sequence.num_tokens) - len(hits)
        complete = len(hits) * pool.block_size == sequence.num_tokens
        needed = missing + (1 if complete and pool.references(hits[-1]) else 0)
        idle = sum(pool.references(block) == 0 for block in hits)  # counted as available, until they are shared
        if pool.num_available - idle < needed + reserve:
            return False
        for block in hits:
            pool.share(block)
        sequence.slot = slot
        sequence.num_cached = min(len(hits) * pool.block_size, sequence.num_tokens - 1)
        sequence.num_indexed = sequence.num_cached // pool.block_size
        self._set(sequence, hits + pool.allocate(missing))
        ready = self._own_next_block(sequence)
        assert ready, "room for the copy was counted"
        return True

    def growth(self, sequence: Sequence) -> int:
        """Blocks a sequence may still ask for, beside those for the tokens it has."""
        held = max(len(sequence.blocks), self._pool.blocks_for(sequence.num_tokens))
        return self._pool.blocks_for(sequence.max_tokens - 1) - held  # the last token it may have is not cached

    # decoding

    def prepare_write(self, sequence: Sequence) -> bool:
        """Sees to it that a decoding sequence has a block of its own for its newest token. False, with nothing lost,
        when that takes a block and none is available."""
        missing = self._pool.blocks_for(sequence.num_tokens) - len(sequence.blocks)
        if missing > self._pool.num_available:
            return False
        if missing > 0:
            self._set(sequence, sequence.blocks + self._pool.allocate(missing))
        return self._own_next_block(sequence)

    def take_ahead(self, sequences: Collection[Sequence], steps: int) -> int:
        """Takes the blocks that up to ``steps`` decode steps in a row need, as far as they are available. Returns how
        many steps that is: at least one, for which ``prepare_write`` has seen."""

        def missing(ahead: int) -> int:
            return sum(max(0, self._blocks_after(sequence, ahead) - len(sequence.blocks)) for sequence in sequences)

        if missing(steps) > self._pool.num_available:
            steps = bisect_right(range(1, steps), self._pool.num_available, key=missing)
        for sequence in sequences:
            wanted = self._blocks_after(sequence, steps) - len(sequence.blocks)
            if wanted > 0:
                self._set(sequence, sequence.blocks + self._pool.allocate(wanted))
        return steps

    # after a step

    def index_full(self, sequence: Sequence) -> None:
        """Gives the blocks that the last step has filled to the prefix index."""
        first, full = sequence.num_indexed, sequence.num_cached // self._pool.block_size
        if full == first:
            return
        keys = sequence.block_keys(self._pool.block_size)  # none of an embedded prompt
        for key, block in zip(keys[first:full], sequence.blocks[first:full], strict=False):
            self._index.insert(key, block)
        sequence.num_indexed = full

    def return_unused(self, sequence: Sequence) -> None:
        """Gives back the blocks that were taken ahead for steps that did not come."""
        kept = self._pool.blocks_for(sequence.num_tokens)
        if len(sequence.blocks) > kept:
            self._release(sequence.blocks[kept:])
            self._set(sequence, sequence.blocks[:kept])

    def release(self, sequence: Sequence) -> None:
        """Takes all of a sequence's blocks back, and its slot."""
        assert sequence.slot is not None
        self._changed.pop(sequence.slot, None)
        self._release(sequence.blocks)
        sequence.slot, sequence.blocks = None, []
        sequence.num_cached = sequence.num_indexed = 0

    def _release(self, blocks: list[int]) -> None:
        """The last block first: of those that stay in the index, the start of a prefix, which more prompts have in
        common, is to live longest."""
        for block in reversed(blocks):
            self._pool.release(block)

    def _own_next_block(self, sequence: Sequence) -> bool:
        """Copy on write for the position that comes next. False when the copy finds no block."""
        index = sequence.num_cached // self._pool.block_size
        block = sequence.blocks[index]
        shared = self._pool.is_shared(block)
        if not shared and not self._pool.is_indexed(block):
            return True
        if not self._pool.num_available:
            if shared:
                return False
            self._index.forget(block)  # nobody else reads it, and there is no room for two
            return True
        (copy,) = self._pool.allocate(1)
        self._copies.append((block, copy))
        self._set(sequence, [*sequence.blocks[:index], copy, *sequence.blocks[index + 1 :]])
        self._pool.release(block)
        return True

    def _blocks_after(self, sequence: Sequence, steps: int) -> int:
        """Blocks of the positions written by so many decode steps from now on."""
        return self._pool.blocks_for(min(sequence.num_tokens + steps, sequence.max_tokens) - 1)

    def _set(self, sequence: Sequence, blocks: Iterable[int]) -> None:
        assert sequence.slot is not None
        sequence.blocks = list(blocks)
        self._changed[sequence.slot] = sequence
