"""OwnRows: the rows of a state for one user who sets them by hand, for measurements and teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skipkernels.decoding.prompt_rows import PromptRows
from skipkernels.decoding.run_record import RunRecord
from skipkernels.decoding.sequence import Sequence as TokenSequence
from skipkernels.decoding.step import PromptChunk
from skipkernels.errors import RequestError
from skipkernels.executors import Executor
from skipkernels.program.state import DecodeState
from skipkernels.skipping.policy import GatePlan


class OwnRows:
    """The first ``num_slots`` slots have blocks of their own for ``max_seq_len`` positions; more do not fit."""

    def __init__(self, state: DecodeState, prompt_rows: PromptRows, dense: Executor) -> None:
        self.state = state
        self._prompt_rows = prompt_rows
        self._dense = dense
        per_slot = state.block_table.shape[1]
        self.num_slots = min(state.num_sequences, state.num_blocks // per_slot)
        for slot in range(self.num_slots):
            state.set_blocks(slot, range(slot * per_slot, (slot + 1) * per_slot))

    def begin(self, slot: int, token_ids: Sequence[int], plan: GatePlan | None = None) -> None:
        """Caches all tokens but the last. From ``start`` on the slot decodes, greedily and without an end."""
        self._begin(slot, torch.tensor(token_ids, dtype=torch.int32), plan)
        sequence, capacity = TokenSequence(token_ids), self._prompt_rows.capacity
        for start in range(0, len(token_ids) - 1, capacity):
            end = min(start + capacity, len(token_ids) - 1)
            self._prompt_rows.place([(PromptChunk(slot, sequence, start, end), RunRecord())])
            self._prompt_rows.run()
            self._dense.run(1)

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
