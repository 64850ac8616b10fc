"""Step: what the row scheduler has decided for the next step of the decode program."""

from __future__ import annotations

from dataclasses import dataclass

from skipkernels.decoding.sequence import Sequence


@dataclass(frozen=True)
class DecodeRow:
    """The newest token of a sequence, in the row of its slot.

    ``starts``: this row did not run in the step before: the slot's buffers must be set up for the sequence, also for
    one that goes on after it was preempted.
    """

    slot: int
    sequence: Sequence
    starts: bool


@dataclass(frozen=True)
class PromptChunk:
    """Prompt rows for ``sequence.tokens[start:end]``: keys and values only, no logits.

    Positions from ``sequence.num_prompt_tokens`` on were generated before the sequence was preempted.
    """

    slot: int
    sequence: Sequence
    start: int
    end: int


@dataclass(frozen=True)
class Step:
    """One call of the executor. To be done in the order of the fields:

    Args:
        preempted: (slot, sequence) whose slot is vacant now; no new sequence takes it in this step.
        copies: (source, destination) blocks to copy before anything is written, one after the other in this order:
            a later destination may be an earlier source.
        block_tables: (slot, blocks) of the tables that have changed.
        admitted: sequences that have come to a slot.
        chunks: the prompt rows of the first step.
        decode_rows: the decode rows, by arrival of their sequences.
        max_steps: how many decode steps may be run at once: that many positions have a block, and no prompt waits for
            rows. Prompt rows take part in the first only.
    """

    preempted: tuple[tuple[int, Sequence], ...]
    copies: tuple[tuple[int, int], ...]
    block_tables: tuple[tuple[int, tuple[int, ...]], ...]
    admitted: tuple[Sequence, ...]
    chunks: tuple[PromptChunk, ...]
    decode_rows: tuple[DecodeRow, ...]
    max_steps: int

    @property
    def num_prompt_rows(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)

    @property
    def prompt_position(self) -> float:
        """Mean over the prompt rows; 0 where there are none."""
        ends = sum((chunk.end - chunk.start) * (chunk.start + chunk.end - 1) / 2 for chunk in self.chunks)
        return ends / self.num_prompt_rows if self.chunks else 0.0

    @property
    def empty(self) -> bool:
        """There is nothing to run."""
        return not self.chunks and not self.decode_rows
