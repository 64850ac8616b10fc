"""PrefixIndex: finds the blocks of a prompt's start that some sequence, perhaps ended long ago, has already filled."""

from __future__ import annotations

from collections.abc import Iterable

from skipkernels.decoding.block_key import BlockKey
from skipkernels.decoding.block_pool import BlockPool


class PrefixIndex:
    """Full blocks by what they hold.

    Only full blocks are indexed: nothing is written to them any more, so they can be read by many. Which of those
    without a reference is given up first is the pool's business: the one released the longest ago.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._blocks: dict[bytes, tuple[BlockKey, int]] = {}  # by digest
        self._keys: dict[int, BlockKey] = {}  # by block
        pool.on_evict = self._drop

    def __len__(self) -> int:
        return len(self._blocks)

    def match(self, keys: Iterable[BlockKey]) -> list[int]:
        """Blocks of the longest indexed prefix of a sequence with these keys. No reference is taken."""
        blocks = []
        for key in keys:
            held, block = self._blocks.get(key.digest, (None, -1))
            if held != key:  # not there, or another content with the same digest
                break
            blocks.append(block)
        return blocks

    def insert(self, key: BlockKey, block: int) -> bool:
        """Makes a full block findable. False where another block with this content is: one of each is enough."""
        if key.digest in self._blocks:
            return False
        assert block not in self._keys, f"block {block} is indexed already: a full block must not change"
        self._blocks[key.digest] = key, block
        self._keys[block] = key
        self._pool.mark_indexed(block)
        return True

    def clear(self) -> None:
        """Forgets every block."""
        for block in list(self._keys):
            self.forget(block)

    def forget(self, block: int) -> None:
        """Takes a block out, so that its holder may write to it."""
        self._drop(block)
        self._pool.mark_unindexed(block)

    def _drop(self, block: int) -> None:
        """Blocks that follow this one cannot be found while it is out. Their keys stay true, so they are found again
        when a block with its content comes back; until then they grow old in the pool."""
        del self._blocks[self._keys.pop(block).digest]
