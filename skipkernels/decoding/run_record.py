"""RunRecord: which FFNs the generated tokens of one sequence ran, kept beside the slot it may lose."""

from __future__ import annotations

import torch

from skipkernels.program.state import DecodeState


class RunRecord:
    """What a sequence takes along when its slot is given to another one and it comes back to a new one: the FFNs that
    each of its tokens ran, so that they can be computed again bit for bit, and what the skip gate counts."""

    def __init__(self) -> None:
        self.run_map = torch.empty(0, 0, dtype=torch.uint8)  # [tokens, layers]
        self.similarity_map = torch.empty(0, 0)  # [tokens, layers]
        self._skipped = 0
        self._threshold_scale = 1.0

    def save(self, state: DecodeState, slot: int, tokens: int) -> None:
        """Copies what the first ``tokens`` generated tokens of ``slot`` left behind."""
        self.run_map = state.run_map[slot, :tokens].clone()
        self.similarity_map = state.similarity_map[slot, :tokens].clone()
        self._skipped = int(state.skipped[slot])
        self._threshold_scale = float(state.threshold_scale[slot])

    def restore(self, state: DecodeState, slot: int) -> None:
        """Gives ``slot``, begun for this sequence, what was saved."""
        tokens = len(self.run_map)
        if tokens:
            state.run_map[slot, :tokens] = self.run_map
            state.similarity_map[slot, :tokens] = self.similarity_map
        state.skipped[slot] = self._skipped
        state.threshold_scale[slot] = self._threshold_scale
