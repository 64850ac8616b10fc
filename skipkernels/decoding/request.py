"""Request: what is asked for one prompt, checked and complete."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import count

from skipkernels.decoding.generation import SamplingParams
from skipkernels.model.prompt import EmbeddedPrompt
from skipkernels.skipping.policy import GatePlan


@dataclass(frozen=True, eq=False)
class Request:
    """``plan`` is the lowered skip policy, None where every FFN runs; ``max_new_tokens`` None: until an end-of-sequence
    token or a full cache. ``deadline`` orders the prompts that wait for rows, on whatever clock the caller has."""

    token_ids: tuple[int, ...]
    plan: GatePlan | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    embedded: EmbeddedPrompt | None = None
    deadline: float = math.inf
    number: int = field(default_factory=count().__next__)

    @property
    def policy_identity(self) -> str | None:
        """Names what the keys and values of generated tokens depend on beside the tokens. Under a batch rule they
        depend on the other rows, so nobody else's are the same."""
        if self.plan is None:
            return None
        return repr(self.plan) if self.plan.batch_rule == "per_row" else self.own_identity

    @property
    def own_identity(self) -> str:
        """Of keys and values that nobody else's are the same as."""
        return f"request {self.number}"
