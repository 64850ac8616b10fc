"""No sequence starves: a bound on the steps until it ends, while newer ones keep coming."""

from __future__ import annotations

import random

import pytest

from skipkernels.decoding.block_pool import BlockPool
from skipkernels.decoding.prefix_index import PrefixIndex
from skipkernels.decoding.row_scheduler import RowScheduler
from skipkernels.decoding.sequence import Sequence

PROMPT_ROWS = 3


class NewestFirst(RowScheduler):
    """Serves whoever came last."""

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self._waiting.appendleft(self._waiting.pop())


class PreemptsTheOldest(RowScheduler):
    def _preempt_last(self) -> tuple[int, Sequence]:
        self._running.append(self._running.pop(0))
        return super()._preempt_last()


def cost(sequence: Sequence) -> int:
    """Steps a sequence needs at most once it is the oldest one: one to be admitted, all its tokens once more if it was
    preempted, and one for each new token."""
    return 1 + -(-sequence.max_tokens // PROMPT_ROWS) + sequence.max_tokens - sequence.num_prompt_tokens


def overdue(scheduler_type: type[RowScheduler], seed: int) -> tuple[int, int]:
    """(sequences that were not through after the cost of all older ones and their own, preemptions) under more
    requests than can be served."""
    draw = random.Random(seed)
    pool = BlockPool(8, 4, block_bytes=1)
    scheduler = scheduler_type(3, PROMPT_ROWS, pool, PrefixIndex(pool), 26)
    deadlines: dict[Sequence, int] = {}
    late: set[Sequence] = set()
    preemptions = 0
    for step_number in range(600):
        alive = [sequence for sequence in deadlines if not sequence.status.ended]
        while len(alive) < 9:
            prompt = [draw.randrange(1000) for _ in range(draw.randint(1, 16))]
            alive.append(Sequence(prompt, max_new_tokens=draw.randint(1, 11)))
            scheduler.add(alive[-1])
            deadlines[alive[-1]] = step_number + sum(cost(older) for older in alive)
        step = scheduler.plan()
        preemptions += len(step.preempted)
        scheduler.commit(step, {row.slot: [draw.randrange(1000)] for row in step.decode_rows})
        late.update(s for s, deadline in deadlines.items() if not s.status.ended and step_number >= deadline)
    return len(late), preemptions


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_ends_within_the_cost_of_those_before_it(seed: int) -> None:
    late, preemptions = overdue(RowScheduler, seed)
    assert late == 0
    assert preemptions > 10, "nothing was put to the test"


@pytest.mark.parametrize("unfair", [NewestFirst, PreemptsTheOldest])
def test_an_unfair_scheduler_is_seen(unfair: type[RowScheduler]) -> None:
    assert any(overdue(unfair, seed)[0] for seed in range(5))


def test_prompt_rows_go_to_the_oldest_first_and_streams_never_stop() -> None:
    pool = BlockPool(64, 4, block_bytes=1)
    scheduler = RowScheduler(3, 8, pool, PrefixIndex(pool), 128)
    stream, long, short = Sequence([1], max_new_tokens=50), Sequence(range(100, 121)), Sequence(range(200, 203))
    scheduler.add(stream)
    scheduler.commit(scheduler.plan(), {0: [2]})
    scheduler.add(long)
    scheduler.add(short)
    seen = []
    for _ in range(4):
        step = scheduler.plan(wish=16)
        seen.append(([(chunk.sequence, chunk.start, chunk.end) for chunk in step.chunks], step.max_steps))
        assert stream in [row.sequence for row in step.decode_rows]
        scheduler.commit(step, {row.slot: [3] * step.max_steps for row in step.decode_rows})
    assert seen[:3] == [([(long, 0, 8)], 1), ([(long, 8, 16)], 1), ([(long, 16, 20), (short, 0, 2)], 16)]
    assert seen[3] == ([], 16)
