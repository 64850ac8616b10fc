"""Decode speed of an engine under several policies, measured in alternation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from skipkernels.decoding.generation import Generation, SamplingParams
from skipkernels.skipping.policy import Policy

if TYPE_CHECKING:
    from skipkernels.engine import Engine


@dataclass(frozen=True)
class Speed:
    """One row's decode under one policy."""

    tokens_per_s: float  # median of the rounds, without the first token
    skip_ratio: float  # share of FFN bytes not read


def measure_speeds(
    engine: Engine,
    prompt: Sequence[int],
    policies: Sequence[Policy],
    *,
    new_tokens: int,
    rounds: int,
    sampling: SamplingParams | None = None,
    on_run: Callable[[float], None] = lambda share: None,
) -> list[Speed]:
    """The decode speed of one row under each policy.

    The policies take turns, so that other load on the machine affects all of them alike. End-of-sequence tokens are
    ignored: every run decodes ``new_tokens`` tokens. ``on_run`` is called with the share that is done.
    """
    runs: list[list[Generation]] = [[] for _ in policies]
    for turn in range(rounds):
        for index, policy in enumerate(policies):
            runs[index] += engine.generate(
                [list(prompt)], max_new_tokens=new_tokens, sampling=sampling, eos_token_ids=(), policy=policy
            )
            on_run((turn * len(policies) + index + 1) / (rounds * len(policies)))
    return [Speed(median(run.tokens_per_s for run in same), same[0].unread_ratio) for same in runs]
