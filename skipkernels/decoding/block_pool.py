"""BlockPool: which blocks of the paged key/value cache are held, by how many sequences, and which are free.

A cache of one long strip per sequence must be as long as the longest answer; most of it stays empty. Cut into blocks
of a few positions, of which a sequence holds as many as it has filled, the same memory carries several times the
sequences (PagedAttention: Kwon et al., SOSP 2023, arXiv 2309.06180). The pool knows blocks by number only: the
tensors with their keys and values lie in the state.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from skipkernels.errors import RequestError


class BlockPool:
    """Hands out blocks and counts their references.

    A block is *used* (referenced by one sequence or more), *idle* (by none, but its content stands in the prefix
    index and may be wanted again) or *free*. Idle blocks are handed out when no free one is left, the one released
    the longest ago first.

    Args:
        num_blocks: how many there are.
        block_size: positions in a block.
        block_bytes: bytes of a block's keys and values over all layers; errors name it.
    """

    def __init__(self, num_blocks: int, block_size: int, *, block_bytes: int) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size), ("block_bytes", block_bytes)):
            if value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}; give the cache more memory")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.on_evict: Callable[[int], None] | None = None  # told of an idle block before it is handed out again
        self.evictions = 0
        self._references = [0] * num_blocks
        self._free = list(reversed(range(num_blocks)))  # the end is taken first: block 0 before block 1
        self._indexed: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()  # released the longest ago first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """What ``allocate`` can hand out: free and idle blocks."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    @property
    def num_shared(self) -> int:
        """Blocks with more than one reference."""
        return sum(count > 1 for count in self._references)

    def blocks_for(self, positions: int) -> int:
        """Blocks that so many positions fill or begin."""
        return -(-positions // self.block_size)

    def describe(self, count: int) -> str:
        """So many blocks with their size, for messages."""
        blocks = "block" if count == 1 else "blocks"
        return f"{count} {blocks} of {self.block_size} positions ({count * self.block_bytes:,} bytes)"

    def references(self, block: int) -> int:
        return self._references[block]

    def is_shared(self, block: int) -> bool:
        return self._references[block] > 1

    def is_indexed(self, block: int) -> bool:
        return block in self._indexed

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` blocks with one reference each; their content is whatever was left there.

        Raises:
            RequestError: fewer are available; none was taken.
        """
        if count > self.num_available:
            raise RequestError(
                f"{self.describe(count)} needed, {self.describe(self.num_available)} there of {self.num_blocks}; "
                "wait for a sequence to end or give the cache more memory"
            )
        return [self._take() for _ in range(count)]

    def share(self, block: int) -> None:
        """One more reference to a block that is used or idle."""
        assert self._references[block] or block in self._idle, f"block {block} is free: there is nothing to share"
        self._idle.pop(block, None)
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Gives one reference back. With the last one the block becomes free, or idle where it is indexed."""
        assert self._references[block], f"block {block} was released more often than taken"
        self._references[block] -= 1
        if self._references[block]:
            return
        if block in self._indexed:
            self._idle[block] = None
        else:
            self._free.append(block)

    def mark_indexed(self, block: int) -> None:
        """The prefix index knows this block's content from now on."""
        assert self._references[block], f"block {block} is not used: its content is nobody's"
        self._indexed.add(block)

    def mark_unindexed(self, block: int) -> None:
        """The prefix index has forgotten this block; an idle one becomes free."""
        self._indexed.discard(block)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def _take(self) -> int:
        if not self._free:
            oldest = next(iter(self._idle))
            self.evictions += 1
            self.mark_unindexed(oldest)
            if self.on_evict:
                self.on_evict(oldest)
        block = self._free.pop()
        self._references[block] = 1
        return block
