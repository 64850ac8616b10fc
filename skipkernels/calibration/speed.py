"""Decode speed of an engine under several policies, measured in alternation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from skipkernels.decoding.generation import Generation, SamplingParams
from skipkernels.skipping.policy import DensePolicy, Policy

if TYPE_CHECKING:
    from skipkernels.engine import Engine

_ROUNDS = 2, 5


@dataclass(frozen=True)
class Speed:
    """One row's decode under one policy."""

    tokens_per_s: float  # median of the rounds, without the first token
    skip_ratio: float  # share of FFN bytes not read
    rounds: tuple[float, ...]  # tokens/s of each


@dataclass(frozen=True)
class Gain:
    """A policy's decode speed beside the dense model's, one row, in turns in the same run.

    ``ratio`` is the median over the rounds of the policy's tokens/s by the dense model's, ``low`` to ``high`` its
    range.
    """

    dense_tokens_per_s: float
    tokens_per_s: float
    skip_ratio: float
    ratio: float
    low: float
    high: float
    new_tokens: int
    rounds: int

    @classmethod
    def of(cls, dense: Speed, policy: Speed, new_tokens: int) -> Gain:
        ratios = [own / other for own, other in zip(policy.rounds, dense.rounds, strict=True)]
        return cls(
            dense.tokens_per_s,
            policy.tokens_per_s,
            policy.skip_ratio,
            median(ratios),
            min(ratios),
            max(ratios),
            new_tokens,
            len(ratios),
        )

    @property
    def faster(self) -> bool:
        return self.ratio > 1.0


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
    rates = [tuple(run.tokens_per_s for run in same) for same in runs]
    return [Speed(median(rate), same[0].unread_ratio, rate) for rate, same in zip(rates, runs, strict=True)]


def measure_gains(
    engine: Engine, prompt: Sequence[int], policies: Sequence[Policy], *, new_tokens: int, patience_s: float
) -> list[Gain]:
    """Each policy beside the dense model, in as many rounds as ``patience_s`` allows, at least two, at most five."""
    alone = engine.with_rows(1)
    (warm,) = alone.generate([list(prompt)], max_new_tokens=new_tokens, eos_token_ids=(), policy=DensePolicy())
    run_s = new_tokens / max(warm.tokens_per_s, 1e-3)
    rounds = max(_ROUNDS[0], min(_ROUNDS[1], int(patience_s / ((1 + len(policies)) * run_s))))
    dense, *others = measure_speeds(alone, prompt, [DensePolicy(), *policies], new_tokens=new_tokens, rounds=rounds)
    return [Gain.of(dense, other, new_tokens) for other in others]
