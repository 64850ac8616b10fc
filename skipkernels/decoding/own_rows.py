"""OwnRows: the rows of a state for one user who sets them by hand, for measurements and teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skipkernels.decoding.block_pool import BlockPool
from skipkernels.decoding.prefix_index import PrefixIndex
from skipkernels.decoding.prompt_rows import PromptRows
from skipkernels.decoding.run_record import RunRecord
from skipkernels.decoding.sequence import Sequence as TokenSequence
from skipkernels.decoding.step import PromptChunk
from skipkernels.errors import RequestError
from skipkernels.executors import Executor
from skipkernels.program.state import DecodeState
from skipkernels.skipping.policy import GatePlan


class OwnRows:
    """The first ``num_slots`` slots have blocks of their own for ``max_seq_len`` positions; more do not fit. In the
    rest of the pool, what the prefix index knows stays."""

    def __init__(
        self, state: DecodeState, prompt_rows: PromptRows, dense: Executor, pool: BlockPool, index: PrefixIndex
    ) -> None:
        self.state = state
        self._prompt_rows = prompt_rows
        self._dense = dense
        self._pool = pool
        self._index = index
        per_slot = state.block_table.shape[1]
        self.num_slots = min(state.num_sequences, state.num_blocks // per_slot)
        own = pool.allocate(self.num_slots * per_slot)
        self._own = [own[slot * per_slot : (slot + 1) * per_slot] for slot in range(self.num_slots)]
        self._found: list[list[int]] = [[] for _ in self._own]  # by slot, in front of its own blocks
        for slot, blocks in enumerate(self._own):
            state.set_blocks(slot, blocks)

    def begin(self, slot: int, token_ids: Sequence[int], plan: GatePlan | None = None, *, kept: bool = False) -> None:
        """Caches all tokens but the last. From ``start`` on the slot decodes, greedily and without an end. ``kept``:
        the start of the prompt is taken from the prefix index as far as it is there, which gets the rest; not for
        timing."""
        self._begin(slot, torch.tensor(token_ids, dtype=torch.int32), plan)
        sequence, capacity, size = TokenSequence(token_ids), self._prompt_rows.capacity, self.state.block_size
        keys = sequence.block_keys(size)[: (len(token_ids) - 1) // size] if kept else []
        self._found[slot] = found = self._index.match(keys)
        for block in found:
            self._pool.share(block)
        blocks = [*found, *self._own[slot][len(found) :]]
        self.state.set_blocks(slot, blocks)
        for start in range(len(found) * size, len(token_ids) - 1, capacity):
            end = min(start + capacity, len(token_ids) - 1)
            self._prompt_rows.place([(PromptChunk(slot, sequence, start, end), RunRecord())])
            self._prompt_rows.run()
            self._dense.run(1)
        for key, block in list(zip(keys, blocks, strict=False))[len(found) :]:
            self._index.insert(key, block)

    def release(self) -> None:
        """Gives all blocks back."""
        for found, own in zip(self._found, self._own, strict=True):
            for block in reversed([*found, *own]):
                self._pool.release(block)

    def place(self, slot: int, num_cached: int, plan: GatePlan | None = None) -> None:
        """As ``begin`` with so many cached positions, whatever they hold: for timing."""
        self._begin(slot, torch.zeros(num_cached + 1, dtype=torch.int32), plan)

    def _begin(self, slot: int, token_ids: torch.Tensor, plan: GatePlan | None) -> None:
        state = self.state
        if slot >= self.num_slots:
            raise RequestError(
                f"the cache has room for {self.num_slots} rows at max_seq_len={state.max_seq_len}, row {slot} was "
                "wanted; load the engine with a larger cache_bytes or a smaller max_seq_len"
            )
        for block in self._found[slot]:
            self._pool.release(block)
        self._found[slot] = []
        for block in self._own[slot]:
            if self._pool.is_indexed(block):  # it is written again
                assert not self._pool.is_shared(block), "another slot reads this slot's prompt"
                self._index.forget(block)
        state.set_blocks(slot, self._own[slot])
        state.begin_sequence(slot, token_ids)
        state.set_policy(slot, plan)
        state.temperature[slot] = 0.0
        state.repetition_penalty[slot] = 1.0
        state.adjusts[slot] = state.num_logprobs[slot] = 0
        state.max_new_tokens[slot] = state.max_seq_len + 1
        state.eos_token_ids[slot] = -1

    def start(self) -> None:
        """Lets every slot that has begun decode."""
        for slot in range(self.state.num_sequences):
            if self.state.progress[slot, 1]:
                self.state.start_decoding(slot)
