import pytest

from skipkernels.decoding.block_pool import BlockPool
from skipkernels.errors import RequestError


def pool(num_blocks: int = 4) -> BlockPool:
    return BlockPool(num_blocks, 16, block_bytes=1000)


def test_blocks_are_counted_out_and_back() -> None:
    blocks = pool()
    taken = blocks.allocate(3)
    assert len(set(taken)) == 3
    assert (blocks.num_used, blocks.num_free, blocks.num_available) == (3, 1, 1)
    for block in taken:
        blocks.release(block)
    assert (blocks.num_used, blocks.num_free) == (0, 4)


def test_too_many_blocks_are_refused_with_blocks_and_bytes_needed_and_there() -> None:
    blocks = pool()
    blocks.allocate(3)
    with pytest.raises(RequestError, match=r"2 blocks of 16 positions \(2,000 bytes\) needed, 1 block .*1,000 bytes"):
        blocks.allocate(2)
    assert blocks.num_free == 1


def test_a_shared_block_is_free_when_its_last_reference_goes() -> None:
    blocks = pool()
    (block,) = blocks.allocate(1)
    blocks.share(block)
    assert blocks.is_shared(block)
    blocks.release(block)
    assert not blocks.is_shared(block)
    assert blocks.references(block) == 1
    blocks.release(block)
    assert blocks.num_free == 4


def test_idle_blocks_are_kept_until_needed_and_the_longest_idle_goes_first() -> None:
    blocks, evicted = pool(), list[int]()
    blocks.on_evict = evicted.append
    first, second, third, plain = blocks.allocate(4)
    for block in (first, second, third):
        blocks.mark_indexed(block)
    for block in (second, first, third, plain):
        blocks.release(block)
    assert (blocks.num_free, blocks.num_idle, blocks.num_available) == (1, 3, 4)
    assert blocks.allocate(1) == [plain]
    assert evicted == []
    blocks.share(second)  # wanted again: youngest from now on
    blocks.release(second)
    assert blocks.allocate(2) == [first, third]
    assert evicted == [first, third]
    assert not blocks.is_indexed(first)
    assert blocks.is_indexed(second)


def test_an_idle_block_the_index_forgets_is_free() -> None:
    blocks = pool()
    (block,) = blocks.allocate(1)
    blocks.mark_indexed(block)
    blocks.release(block)
    blocks.mark_unindexed(block)
    assert (blocks.num_idle, blocks.num_free) == (0, 4)


@pytest.mark.parametrize("misuse", ["release", "share", "mark_indexed"])
def test_a_free_block_is_nobodys(misuse: str) -> None:
    with pytest.raises(AssertionError):
        getattr(pool(), misuse)(0)


@pytest.mark.parametrize(
    ("sizes", "name"), [((0, 16, 1), "num_blocks"), ((1, 0, 1), "block_size"), ((1, 1, 0), "bytes")]
)
def test_sizes_must_be_positive(sizes: tuple[int, int, int], name: str) -> None:
    with pytest.raises(RequestError, match=f"{name}.* must be at least 1, got 0"):
        BlockPool(sizes[0], sizes[1], block_bytes=sizes[2])


def test_positions_to_blocks() -> None:
    assert [pool().blocks_for(positions) for positions in (0, 1, 16, 17)] == [0, 1, 1, 2]
