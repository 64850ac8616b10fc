from collections.abc import Sequence as Tokens

import pytest

from skipkernels.decoding import block_key
from skipkernels.decoding.block_key import BlockKey
from skipkernels.decoding.block_pool import BlockPool
from skipkernels.decoding.prefix_index import PrefixIndex


def keys(*blocks: Tokens[int], policy: str | None = None) -> list[BlockKey]:
    chain: list[BlockKey] = []
    for tokens in blocks:
        chain.append(BlockKey.after(chain[-1] if chain else None, tokens, policy))
    return chain


def filled(num_blocks: int, *chains: list[BlockKey]) -> tuple[BlockPool, PrefixIndex]:
    """An index over a pool in which each chain's blocks were taken, filled and released again, the last one first."""
    pool = BlockPool(num_blocks, 2, block_bytes=1)
    index = PrefixIndex(pool)
    for chain in chains:
        blocks = pool.allocate(len(chain))
        for key, block in zip(chain, blocks, strict=True):
            index.insert(key, block)
        for block in reversed(blocks):
            pool.release(block)
    return pool, index


def test_the_longest_prefix_is_found() -> None:
    _, index = filled(4, keys([1, 2], [3, 4], [5, 6]))
    assert index.match(keys([1, 2], [3, 4], [9, 9])) == [0, 1]
    assert index.match(keys([1, 2], [3, 4], [5, 6], [7, 8])) == [0, 1, 2]
    assert index.match(keys([3, 4])) == []


def test_the_same_tokens_after_others_are_another_block() -> None:
    _, index = filled(4, keys([1, 2], [3, 4]))
    assert index.match(keys([2, 1], [3, 4])) == []
    assert keys([1, 2], [3, 4])[1] != keys([2, 1], [3, 4])[1]


def test_policies_do_not_share() -> None:
    _, index = filled(4, keys([1, 2], policy="skip"))
    assert index.match(keys([1, 2])) == []
    assert index.match(keys([1, 2], policy="other")) == []
    assert index.match(keys([1, 2], policy="skip")) == [0]


def test_no_policy_is_not_a_policy_without_a_name() -> None:
    assert BlockKey.after(None, [1], None).digest != BlockKey.after(None, [1], "").digest


def test_a_collision_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_key, "_digest", lambda *_: b"the same")
    _, index = filled(4, keys([1, 2]))
    assert index.match(keys([1, 2])) == [0]
    assert index.match(keys([3, 4])) == []
    assert index.match(keys([1, 2], policy="skip")) == []


def test_one_block_of_each_content_is_enough() -> None:
    pool, index = filled(4, keys([1, 2]))
    (other,) = pool.allocate(1)
    assert not index.insert(keys([1, 2])[0], other)
    assert not pool.is_indexed(other)
    assert index.match(keys([1, 2])) == [0]


def test_what_the_pool_hands_out_is_not_found_any_more() -> None:
    pool, index = filled(3, keys([1, 2], [3, 4], [5, 6]))
    pool.allocate(1)
    assert index.match(keys([1, 2], [3, 4], [5, 6])) == [0, 1], "the end of a prefix goes before its start"
    pool.allocate(2)
    assert len(index) == 0


def test_blocks_after_one_that_is_gone_are_found_again_when_it_comes_back() -> None:
    chain = keys([1, 2], [3, 4])
    pool, index = filled(3, chain)
    index.forget(0)
    assert index.match(chain) == []
    (block,) = pool.allocate(1)
    index.insert(chain[0], block)
    assert index.match(chain) == [block, 1]


def test_a_forgotten_block_may_be_written_to() -> None:
    pool, index = filled(3, keys([1, 2]))
    pool.share(0)
    index.forget(0)
    assert index.match(keys([1, 2])) == []
    assert not pool.is_indexed(0)
    pool.release(0)
    assert pool.num_free == 3
