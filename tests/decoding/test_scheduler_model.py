"""Pool, index and scheduler against a plain dictionary of what the cache must hold, in any order of events.

``BROKEN`` lists deliberately broken schedulers and the rule each of them falls over: the machine would see such an
error.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from skipkernels.decoding.block_pool import BlockPool
from skipkernels.decoding.block_tables import BlockTables
from skipkernels.decoding.prefix_index import PrefixIndex
from skipkernels.decoding.row_scheduler import RowScheduler
from skipkernels.decoding.sequence import Sequence
from skipkernels.errors import RequestError
from tests.decoding.simulated_cache import SimulatedCache

TOKENS = st.integers(0, 1)  # few, so that prompts meet each other's blocks
POLICIES = st.sampled_from([None, None, "half", "quarter"])


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, end, are cancelled and preempted in any order. The subclasses under BROKEN replace its parts."""

    scheduler: type[RowScheduler] = RowScheduler
    index: type[PrefixIndex] = PrefixIndex
    sequence: type[Sequence] = Sequence

    @initialize(
        positions=st.integers(6, 36), block_size=st.integers(1, 4), slots=st.integers(1, 4), rows=st.integers(1, 9)
    )
    def start(self, positions: int, block_size: int, slots: int, rows: int) -> None:
        self.cache = SimulatedCache(
            num_blocks=positions // block_size,
            block_size=block_size,
            slots=slots,
            prompt_rows=rows,
            scheduler=self.scheduler,
            index=self.index,
        )
        self.known: list[list[int]] = [[]]
        self.ended: list[Sequence] = []

    @rule(data=st.data(), tail=st.just([]) | st.lists(TOKENS, max_size=9), policy=POLICIES, embedded=st.integers(0, 9))
    def add(self, data: st.DataObject, tail: list[int], policy: str | None, embedded: int) -> None:
        """A prompt that begins as an earlier sequence did, its answer included."""
        known = data.draw(st.sampled_from(self.known))
        prompt = known[: data.draw(st.just(len(known)) | st.integers(0, len(known)))] + tail
        if not prompt:
            return
        sequence = self.sequence(
            prompt,
            max_new_tokens=data.draw(st.none() | st.integers(1, 12)),
            policy_identity=policy,
            embedded="image" if embedded == 0 else None,
        )
        room = self.cache.pool.num_blocks * self.cache.pool.block_size
        positions = len(prompt) + (sequence.max_new_tokens or 1) - 1
        if positions > min(room, self.cache.scheduler.max_seq_len):
            with pytest.raises(RequestError):
                self.cache.add(sequence)
        else:
            self.cache.add(sequence)
            self.known.append(sequence.tokens)

    @precondition(lambda self: self.cache.sequences)
    @rule(data=st.data(), wish=st.integers(1, 6), steps=st.integers(1, 4))
    def run(self, data: st.DataObject, wish: int, steps: int) -> None:
        for _ in range(steps):
            if self.cache.sequences:
                self.cache.run_step(
                    lambda: data.draw(TOKENS), wish=wish, ended=lambda sequence: data.draw(st.integers(0, 15)) == 15
                )

    @precondition(lambda self: self.cache.sequences)
    @rule(data=st.data())
    def cancel_while_a_step_runs(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(self.cache.sequences))
        self.cache.run_step(lambda: data.draw(TOKENS), wish=3, in_flight=lambda: self.cache.cancel(victim))
        self.ended.append(victim)

    @precondition(lambda self: self.cache.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.ended.append(data.draw(st.sampled_from(self.cache.sequences)))
        self.cache.cancel(self.ended[-1])

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def use_after_the_end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.ended))
        for use in (self.cache.scheduler.cancel, self.cache.scheduler.add):
            with pytest.raises(RequestError, match=r"ended|before"):
                use(sequence)

    @precondition(lambda self: self.cache.scheduler.num_running)
    @rule()
    def preempt(self) -> None:
        self.cache.scheduler._preempt_last()

    @precondition(lambda self: self.cache.sequences)
    @rule()
    def fail(self) -> None:
        self.cache.fail_step()

    @invariant()
    def holds(self) -> None:
        self.cache.check()

    def teardown(self) -> None:
        if hasattr(self, "cache") and self.cache.sound:
            self.cache.drain()
            self.cache.check_nothing_is_left()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=150, stateful_step_count=40)


class LeakyTables(BlockTables):
    """Forgets to release the last block of a sequence."""

    def _release(self, blocks: list[int]) -> None:
        super()._release(blocks[:-1])


class TablesWithoutCopies(BlockTables):
    """Writes to whatever block comes next."""

    def _own_next_block(self, sequence: Sequence) -> bool:
        return True


class TablesThatIndexEarly(BlockTables):
    """Promises a block before its last position is written."""

    def index_full(self, sequence: Sequence) -> None:
        sequence.num_cached += 1
        super().index_full(sequence)
        sequence.num_cached -= 1


class TablesKeptSecret(BlockTables):
    """Does not tell the device of the blocks a copy has put into a table."""

    def prepare_write(self, sequence: Sequence) -> bool:
        known = dict(self._changed)
        done = super().prepare_write(sequence)
        self._changed = known
        return done


class PolicyBlindSequence(Sequence):
    """Shares what was generated under one policy with everybody."""

    def _identity_up_to(self, end: int) -> str | None:
        return None


class IndexThatKeepsAll(PrefixIndex):
    """Still finds blocks that were handed out again."""

    def __init__(self, pool: BlockPool) -> None:
        super().__init__(pool)
        pool.on_evict = None


class SchedulerThatPreemptsTheOldest(RowScheduler):
    def _preempt_last(self) -> tuple[int, Sequence]:
        self._running.append(self._running.pop(0))
        return super()._preempt_last()


def with_tables(tables: type[BlockTables]) -> type[RowScheduler]:
    class Scheduler(RowScheduler):
        def __init__(self, slots: int, prompt_rows: int, pool: BlockPool, index: PrefixIndex, max_seq_len: int) -> None:
            super().__init__(slots, prompt_rows, pool, index, max_seq_len)
            self._tables = tables(pool, index)

    return Scheduler


BROKEN: dict[str, tuple[dict[str, type], str]] = {
    "forgets a release": ({"scheduler": with_tables(LeakyTables)}, "leak|in two hands, or in none"),
    "does not copy on write": ({"scheduler": with_tables(TablesWithoutCopies)}, "written: a block"),
    "indexes before it is written": (
        {"scheduler": with_tables(TablesThatIndexEarly)},
        "written: a block|read",
    ),
    "keeps tables from the device": ({"scheduler": with_tables(TablesKeptSecret)}, "written|read"),
    "shares across policies": ({"sequence": PolicyBlindSequence}, "read"),
    "finds blocks that are gone": ({"index": IndexThatKeepsAll}, "read|nothing to share|is indexed already|promises"),
    "preempts the oldest": ({"scheduler": SchedulerThatPreemptsTheOldest}, "order|starving"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_seen(name: str) -> None:
    parts, message = BROKEN[name]
    machine = type("BrokenMachine", (SchedulerMachine,), parts)
    search = settings(max_examples=400, stateful_step_count=40, phases=[Phase.generate], derandomize=True)
    with pytest.raises(AssertionError, match=message):
        run_state_machine_as_test(machine, settings=search)


def random_sequence(draw: random.Random, tokens: int) -> Sequence:
    prompt = [draw.randrange(2) for _ in range(draw.randint(1, tokens))]
    return Sequence(prompt, max_new_tokens=draw.randint(1, 9), policy_identity=draw.choice([None, None, "half"]))


def test_ten_thousand_sequences_leave_the_pool_as_it_was() -> None:
    draw = random.Random(1)
    cache = SimulatedCache(slots=8, prompt_rows=16, num_blocks=16)
    token = partial(draw.randrange, 2)
    preempted = 0
    for _ in range(10_000):
        sequence = cache.add(random_sequence(draw, 16))
        if draw.random() < 0.05:
            cache.cancel(sequence)
        while cache.scheduler.num_waiting > 4:
            preempted += len(cache.run_step(token, wish=4).preempted)
    cache.drain(token)
    cache.check_nothing_is_left()
    assert preempted > 100, "the pool was not small enough to show anything"
