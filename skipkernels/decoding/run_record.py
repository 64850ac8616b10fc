"""RunRecord: which FFNs the generated tokens of one sequence ran, kept beside the slot it may lose."""

from __future__ import annotations

import torch

from skipkernels.program.state import DecodeState, unread_share


class RunRecord:
    """What a sequence takes along when its slot is given to another one and it comes back to a new one: the FFNs that
    each of its tokens ran and the factors on its thresholds for neurons, so that they can be computed again bit for
    bit, and what the gates count."""

    def __init__(self) -> None:
        self.run_map = torch.empty(0, 0, dtype=torch.uint8)  # [tokens, layers]
        self.similarity_map = torch.empty(0, 0)  # [tokens, layers]
        self.scale_map = torch.empty(0)  # [tokens]
        self.kept_map = torch.empty(0, 0, 2, dtype=torch.int32)  # [tokens, layers, 2]
        self._neuron_counts = torch.empty(0, dtype=torch.int32)  # [layers]
        self._neuron_shares = torch.empty(0, 2)  # [layers, 2]
        self._left_out = 0
        self._skipped = 0
        self._threshold_scale = 1.0

    def save(self, state: DecodeState, slot: int, tokens: int) -> None:
        """Copies what the first ``tokens`` generated tokens of ``slot`` left behind."""
        self.run_map = state.run_map[slot, :tokens].clone()
        self.similarity_map = state.similarity_map[slot, :tokens].clone()
        self.scale_map = state.scale_map[slot, :tokens].clone()
        self.kept_map = state.kept_map[slot, :tokens].clone()
        self._neuron_counts = state.neuron_counts
        self._neuron_shares = state.neuron_shares
        self._left_out = int(state.left_out[slot])
        self._skipped = int(state.skipped[slot])
        self._threshold_scale = float(state.threshold_scale[slot])

    def restore(self, state: DecodeState, slot: int) -> None:
        """Gives ``slot``, begun for this sequence, what was saved."""
        tokens = len(self.run_map)
        if tokens:
            state.run_map[slot, :tokens] = self.run_map
            state.similarity_map[slot, :tokens] = self.similarity_map
            state.scale_map[slot, :tokens] = self.scale_map
            state.kept_map[slot, :tokens] = self.kept_map
        state.left_out[slot] = self._left_out
        state.skipped[slot] = self._skipped
        state.threshold_scale[slot] = self._threshold_scale

    @property
    def unread_map(self) -> torch.Tensor:
        """The share of each FFN's bytes that was not read, f32 [tokens, layers]."""
        return unread_share(self.run_map, self.scale_map, self.kept_map, self._neuron_counts, self._neuron_shares)
