"""Sequence: the host's record of one request in flight: its tokens, and where their keys and values lie."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum

from skipkernels.decoding.block_key import BlockKey
from skipkernels.errors import RequestError


class Status(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # waiting again: its blocks were needed, its tokens are kept
    FINISHED = "finished"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (Status.FINISHED, Status.CANCELLED)


class Sequence:
    """Knows nothing of sampling, of text or of tensors.

    Position p of the cache holds the keys and values of ``tokens[p]``. The newest token's are not there yet: the step
    that computes them also yields the token after it.

    Args:
        prompt_tokens: at least one. Of an embedded prompt, the placeholders.
        max_new_tokens: tokens to generate at most; None: as many as the cache has room for.
        policy_identity: names the skipping policy the tokens are generated under; None: every FFN runs. Two sequences
            with equal tokens, prompt lengths and identities must get equal keys and values: a policy that looks at the
            other rows of a step needs an identity of its own for each sequence.
        embedded: an embedded prompt, opaque. Its tokens do not say what its positions hold, so it is never shared.
        deadline: of prompts that wait for rows, the earliest comes first.
    """

    def __init__(
        self,
        prompt_tokens: Iterable[int],
        *,
        max_new_tokens: int | None = None,
        policy_identity: str | None = None,
        embedded: object | None = None,
        deadline: float = math.inf,
    ) -> None:
        self.tokens = list(prompt_tokens)
        if not self.tokens:
            raise RequestError("the prompt holds no tokens; expected at least 1")
        if max_new_tokens is not None and max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.num_prompt_tokens = len(self.tokens)
        self.max_new_tokens = max_new_tokens
        self.policy_identity = policy_identity
        self.embedded = embedded
        self.deadline = deadline
        # the scheduler's
        self.status = Status.WAITING
        self.arrival: int | None = None  # its place in the order of submission, once it was added
        self.max_tokens = 0  # prompt and generated at most; set when it is added
        self.slot: int | None = None
        self.blocks: list[int] = []
        self.num_cached = 0  # positions whose keys and values are in the cache
        self.num_indexed = 0  # leading blocks that were given to the prefix index
        self.decoding = False  # its decode row runs: all but the newest token is cached
        self._keys: list[BlockKey] = []

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_prompt_rows(self) -> int:
        """Tokens still to be cached before the decode row can run the newest one."""
        return len(self.tokens) - 1 - self.num_cached

    def block_keys(self, block_size: int) -> list[BlockKey]:
        """The keys of all full blocks of its tokens, cached or not; none where nothing may be shared."""
        if self.embedded is not None:
            return []
        for start in range(len(self._keys) * block_size, len(self.tokens) - block_size + 1, block_size):
            end = start + block_size
            parent = self._keys[-1] if self._keys else None
            self._keys.append(BlockKey.after(parent, self.tokens[start:end], self._identity_up_to(end)))
        return self._keys

    def _identity_up_to(self, end: int) -> str | None:
        """Prompts are written in full. What a generated position holds depends on where generation began, too: a
        policy counts its warm-up from there, and the same tokens as a prompt would not have skipped."""
        if self.policy_identity is None or end <= self.num_prompt_tokens:
            return None
        return f"{self.num_prompt_tokens}:{self.policy_identity}"
