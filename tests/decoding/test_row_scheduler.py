"""The scheduler's decisions one by one; test_scheduler_model.py has them in any order."""

from itertools import pairwise

import pytest

from skipkernels.decoding.block_pool import BlockPool
from skipkernels.decoding.prefix_index import PrefixIndex
from skipkernels.decoding.row_scheduler import RowScheduler
from skipkernels.decoding.sequence import Sequence, Status
from skipkernels.decoding.step import PromptChunk, Step
from skipkernels.errors import RequestError
from tests.decoding.simulated_cache import BLOCK_BYTES, SimulatedCache


def starts(step: Step) -> list[Sequence]:
    return [row.sequence for row in step.decode_rows if row.starts]


def test_a_prompts_last_token_runs_in_its_decode_row_in_the_same_step() -> None:
    cache = SimulatedCache(prompt_rows=5)
    sequence = cache.add(Sequence(range(6), max_new_tokens=3))
    step = cache.run_step()
    assert step.admitted == (sequence,)
    assert step.chunks == (PromptChunk(0, sequence, 0, 5),)
    assert starts(step) == [sequence]
    assert (sequence.num_cached, sequence.generated) == (6, [0])
    step = cache.run_step()
    assert not step.chunks
    assert [row.starts for row in step.decode_rows] == [False]


def test_a_prompt_longer_than_the_rows_takes_several_steps() -> None:
    cache = SimulatedCache(prompt_rows=5)
    sequence = cache.add(Sequence(range(12)))
    steps = [cache.run_step(wish=8) for _ in range(3)]
    assert [[(chunk.start, chunk.end) for chunk in step.chunks] for step in steps] == [[(0, 5)], [(5, 10)], [(10, 11)]]
    assert [starts(step) for step in steps] == [[], [], [sequence]]
    assert [step.max_steps for step in steps] == [1, 1, 8]


def test_a_prompt_of_one_token_needs_no_prompt_row() -> None:
    cache = SimulatedCache()
    cache.add(Sequence([1]))
    step = cache.run_step()
    assert not step.chunks
    assert len(step.decode_rows) == 1


def test_a_second_prompt_shares_the_full_blocks_of_the_first() -> None:
    cache = SimulatedCache(block_size=4)
    first = cache.add(Sequence(range(10)))
    cache.run_step()
    cache.run_step()
    second = cache.add(Sequence([*range(8), 20, 21]))
    step = cache.run_step()
    assert second.blocks[:2] == first.blocks[:2]
    assert [(chunk.start, chunk.end) for chunk in step.chunks] == [(8, 9)]
    assert not step.copies


def test_of_prompts_that_come_at_once_the_first_computes_what_they_have_in_common() -> None:
    cache = SimulatedCache(block_size=4, prompt_rows=8, num_blocks=12)
    first, second = cache.add(Sequence(range(14))), cache.add(Sequence([*range(13), 20]))
    assert [chunk.sequence for chunk in cache.run_step().chunks] == [first]
    step = cache.run_step()
    assert [(chunk.sequence, chunk.start, chunk.end) for chunk in step.chunks] == [(first, 8, 13), (second, 8, 11)]
    assert second.blocks[:2] == first.blocks[:2]
    step = cache.run_step()
    assert [(chunk.start, chunk.end) for chunk in step.chunks] == [(12, 13)], (
        "a half-written block gives way to a full one"
    )
    assert len({*first.blocks, *second.blocks}) == len(first.blocks) + 1


def test_no_room_for_the_copy_of_a_block_that_runs_is_no_room() -> None:
    cache = SimulatedCache(block_size=4, num_blocks=3, prompt_rows=8)
    cache.add(Sequence(range(8), max_new_tokens=5))
    cache.run_step()
    cache.run_step()
    again = cache.add(Sequence(range(8), max_new_tokens=1))
    assert again not in cache.run_step().admitted
    cache.drain()
    assert again.status is Status.FINISHED


def test_the_start_of_a_prefix_is_kept_longest() -> None:
    cache = SimulatedCache(block_size=4, num_blocks=3, prompt_rows=12)
    for prompt in (range(12), range(20, 24)):  # the second needs a block of the first
        cache.add(Sequence(prompt, max_new_tokens=1))
        cache.drain()
    cache.add(Sequence(range(12), max_new_tokens=1))
    assert [(chunk.start, chunk.end) for chunk in cache.run_step().chunks] == [(8, 11)]


def test_an_ended_sequence_still_lends_its_blocks_answer_included() -> None:
    cache = SimulatedCache(block_size=4)
    first = cache.add(Sequence(range(6), max_new_tokens=3))
    cache.drain(lambda: 7)
    assert first.status is Status.FINISHED
    cache.add(Sequence([*range(6), 7, 7, 7, 9]))
    assert [(chunk.start, chunk.end) for chunk in cache.run_step().chunks] == [(8, 9)]


def test_the_last_token_in_a_shared_block_is_computed_in_a_copy() -> None:
    cache = SimulatedCache(block_size=4)
    cache.add(Sequence(range(8), max_new_tokens=1))
    cache.drain()
    again = cache.add(Sequence(range(8)))
    step = cache.run_step()
    assert not step.chunks
    assert starts(step) == [again]
    ((source, destination),) = step.copies
    assert destination in again.blocks
    assert source not in again.blocks


def test_where_there_is_no_room_for_a_copy_the_index_gives_the_block_up() -> None:
    cache = SimulatedCache(block_size=4, num_blocks=2)
    cache.add(Sequence(range(8), max_new_tokens=1))
    cache.drain()
    again = cache.add(Sequence(range(8), max_new_tokens=1))
    step = cache.run_step()
    assert not step.chunks
    assert not step.copies
    assert again.status is Status.FINISHED
    assert len(cache.index) == 2, "once written, the block is found again"


@pytest.mark.parametrize("policy", [None, "skip"])
def test_an_answer_under_a_policy_is_no_prompts_prefix(policy: str | None) -> None:
    cache = SimulatedCache(block_size=4, prompt_rows=16)
    cache.add(Sequence(range(4), max_new_tokens=5, policy_identity="skip"))
    cache.drain(lambda: 7)
    cache.add(Sequence([*range(4), 7, 7, 7, 7, 7], policy_identity=policy))
    assert [(chunk.start, chunk.end) for chunk in cache.run_step().chunks] == [(4, 8)]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    cache = SimulatedCache(block_size=4, prompt_rows=16)
    sequence = cache.add(Sequence(range(4), max_new_tokens=9, policy_identity="skip"))
    for _ in range(6):
        cache.run_step(lambda: 7)
    cache.fail_step()
    assert sequence.status is Status.PREEMPTED
    step = cache.run_step(lambda: 7)
    assert [(chunk.start, chunk.end) for chunk in step.chunks] == [(8, 9)]
    assert starts(step) == [sequence]
    assert sequence.generated == [7] * 7


def test_embedded_prompts_are_not_shared() -> None:
    cache = SimulatedCache(block_size=4)
    for _ in range(2):
        cache.add(Sequence(range(6), max_new_tokens=1, embedded=object()))
        assert cache.run_step().num_prompt_rows == 5
    assert len(cache.index) == 0


def test_the_last_admitted_gives_way_and_comes_back_first() -> None:
    cache = SimulatedCache(slots=2, num_blocks=4, block_size=4)
    first = cache.add(Sequence(range(6), max_new_tokens=10))
    second = cache.add(Sequence(range(10, 14), max_new_tokens=9))
    third = cache.add(Sequence([20], max_new_tokens=1))
    preempted: list[tuple[int, Sequence]] = []
    while not preempted:
        preempted += cache.run_step().preempted
    assert [sequence for _, sequence in preempted] == [second]
    assert second.status is Status.PREEMPTED
    kept = list(second.tokens)
    admitted: list[Sequence] = []
    while first in cache.sequences:
        cache.run_step()
    while third in cache.sequences:
        admitted += cache.run_step().admitted
    assert admitted == [second, third]
    assert second.tokens[: len(kept)] == kept


def test_room_is_left_for_those_that_run() -> None:
    cache = SimulatedCache(num_blocks=4, block_size=4, slots=2)
    cache.add(Sequence(range(8), max_new_tokens=8))
    waiting = cache.add(Sequence(range(20, 28), max_new_tokens=8))
    assert waiting not in cache.run_step().admitted
    alone = SimulatedCache(num_blocks=4, block_size=4, slots=2)
    for prompt in (range(8), range(20, 28)):  # nothing can grow: there is nothing to leave room for
        alone.add(Sequence(prompt, max_new_tokens=1))
    assert len(alone.run_step().admitted) == 2


def test_steps_at_once_are_those_with_blocks() -> None:
    cache = SimulatedCache(num_blocks=3, block_size=4)
    sequence = cache.add(Sequence([1], max_new_tokens=12))
    assert cache.run_step(wish=3).max_steps == 3
    assert cache.run_step(wish=100).max_steps == 9, "up to the end and no further"
    assert sequence.status is Status.FINISHED
    crowded = SimulatedCache(num_blocks=3, block_size=4, slots=2)
    for _ in range(2):
        crowded.add(Sequence([1], max_new_tokens=12))
    assert crowded.run_step(wish=100).max_steps == 4, "one block each, and the third cannot serve both"


def test_a_waiting_sequence_shortens_the_run_to_the_first_known_end() -> None:
    cache = SimulatedCache(slots=2)
    for new in (3, 9, 1):
        cache.add(Sequence([new], max_new_tokens=new))
    assert cache.run_step(wish=8).max_steps == 3
    assert len(cache.run_step(wish=8).admitted) == 1


def test_blocks_taken_ahead_come_back_when_the_steps_do_not() -> None:
    pool = BlockPool(8, 4, block_bytes=1)
    scheduler = RowScheduler(1, 4, pool, PrefixIndex(pool), 32)
    scheduler.add(Sequence([1], max_new_tokens=30))
    step = scheduler.plan(wish=20)
    assert pool.num_used == 5
    scheduler.commit(step, {0: [2, 3]})
    assert pool.num_used == 1
    assert scheduler.plan().block_tables == ((0, (0,)),)


def test_an_end_that_only_the_caller_sees() -> None:
    cache = SimulatedCache()
    sequence = cache.add(Sequence([1]))
    cache.run_step(ended=lambda _: True)
    assert sequence.status is Status.FINISHED
    cache.check_nothing_is_left()


def test_an_answer_without_a_limit_ends_with_the_cache() -> None:
    short = SimulatedCache(max_seq_len=6)
    sequence = short.add(Sequence([1, 2]))
    short.drain()
    assert sequence.num_generated == 5, "the last token is not cached"
    small = SimulatedCache(num_blocks=2, block_size=4)
    sequence = small.add(Sequence([1, 2]))
    small.drain()
    assert sequence.num_generated == 7


def test_cancelled_while_waiting_running_and_in_flight() -> None:
    cache = SimulatedCache(slots=1)
    running, waiting = cache.add(Sequence(range(12))), cache.add(Sequence([1]))
    cache.run_step()
    cache.cancel(waiting)
    cache.run_step(in_flight=lambda: cache.cancel(running))
    assert (running.generated, running.num_cached) == ([], 0)
    cache.check_nothing_is_left()


def too_long(new: int | None, tokens: int, message: str) -> None:
    cache = SimulatedCache(num_blocks=3, block_size=4, max_seq_len=14)
    with pytest.raises(RequestError, match=message):
        cache.add(Sequence(range(tokens), max_new_tokens=new))
    assert not cache.scheduler.has_work


def test_a_prompt_beyond_the_whole_cache_is_refused_with_blocks_and_bytes() -> None:
    there = rf"4 blocks of 4 positions \({4 * BLOCK_BYTES:,} bytes\) needed, .*3 blocks .*\({3 * BLOCK_BYTES:,} bytes\)"
    too_long(None, 13, f"13 tokens: {there}; shorten it")
    too_long(8, 6, f"6 tokens with max_new_tokens=8: {there}; ask for 7 new tokens at most")
    SimulatedCache(num_blocks=3, block_size=4, max_seq_len=14).add(Sequence(range(6), max_new_tokens=7))


def test_a_prompt_beyond_the_longest_sequence_is_refused() -> None:
    too_long(None, 15, "15 tokens, the cache holds max_seq_len=14")
    too_long(10, 6, "leave room for 9 in max_seq_len=14")


def test_use_after_the_end_is_an_error() -> None:
    cache = SimulatedCache()
    sequence = cache.add(Sequence([1], max_new_tokens=1))
    with pytest.raises(RequestError, match="added before and is waiting"):
        cache.scheduler.add(sequence)
    cache.drain()
    with pytest.raises(RequestError, match=r"has ended \(finished\)"):
        cache.scheduler.cancel(sequence)
    with pytest.raises(RequestError, match="added before and is finished"):
        cache.scheduler.add(sequence)


def test_a_second_cancel_is_an_error() -> None:
    cache = SimulatedCache()
    sequence = cache.add(Sequence([1]))
    cache.cancel(sequence)
    with pytest.raises(RequestError, match=r"has ended \(cancelled\)"):
        cache.scheduler.cancel(sequence)


def test_only_its_own_sequences_can_be_cancelled() -> None:
    sequence = Sequence([1])
    SimulatedCache().add(sequence)
    with pytest.raises(RequestError, match="not added to this scheduler"):
        SimulatedCache().scheduler.cancel(sequence)


@pytest.mark.parametrize("name", ["slots", "prompt_rows", "max_seq_len"])
def test_sizes_must_be_positive(name: str) -> None:
    pool = BlockPool(1, 1, block_bytes=1)
    sizes = {"slots": 1, "prompt_rows": 1, "max_seq_len": 1, name: 0}
    with pytest.raises(RequestError, match=f"{name} must be at least 1, got 0"):
        RowScheduler(sizes["slots"], sizes["prompt_rows"], pool, PrefixIndex(pool), sizes["max_seq_len"])


def test_a_wish_must_be_a_step() -> None:
    with pytest.raises(RequestError, match="wish must be at least 1 step, got 0"):
        SimulatedCache().scheduler.plan(0)


def test_steps_follow_one_another() -> None:
    cache = SimulatedCache()
    cache.add(Sequence([1]))
    step = cache.scheduler.plan()
    with pytest.raises(AssertionError, match="planned already"):
        cache.scheduler.plan()
    with pytest.raises(AssertionError, match="100 new tokens, expected 1 to"):
        cache.scheduler.commit(step, {0: [1] * 100})  # more than its blocks hold


def test_nothing_to_do_is_an_empty_step() -> None:
    scheduler = SimulatedCache().scheduler
    step = scheduler.plan()
    assert step.empty
    assert scheduler.commit(step, {}) == ()


def test_prompt_rows_go_to_the_earliest_deadline_but_a_share_to_the_oldest() -> None:
    cache = SimulatedCache(prompt_rows=8, slots=3, num_blocks=30)
    oldest, later, hurried = (
        cache.add(Sequence(range(at, at + 21), deadline=deadline))
        for at, deadline in ((0, 9.0), (100, 5.0), (200, 1.0))
    )
    rows = [{c.sequence: c.end - c.start for c in cache.run_step().chunks} for _ in range(4)]
    assert rows[:3] == [{hurried: 6, oldest: 2}, {hurried: 6, oldest: 2}, {hurried: 6, oldest: 2}]
    assert rows[3] == {hurried: 2, later: 4, oldest: 2}


def test_a_row_late_in_a_prompt_counts_for_more() -> None:
    pool = BlockPool(64, 4, block_bytes=1)
    scheduler = RowScheduler(3, 8, pool, PrefixIndex(pool), 128)
    scheduler.row_growth = 1 / 8
    long = Sequence(range(100, 161))
    scheduler.add(long)
    ends = []
    while not long.decoding:
        step = scheduler.plan()
        ends.append(step.chunks[0].end)
        if len(ends) == 3:
            scheduler.add(short := Sequence([7] * 5, deadline=1.0))
        scheduler.commit(step, {row.slot: [3] for row in step.decode_rows})
    assert ends[:4] == [8, 12, 15, 17], "8 rows, then as many as count for 8; beside an urgent one what is kept for it"
    assert short.decoding
    assert min(end - begin for begin, end in pairwise(ends[:-1])) == 2, "it always gets on"
