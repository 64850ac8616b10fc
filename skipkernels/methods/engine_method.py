"""EngineMethod: a method that skips FFNs; runs on the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import cast

from skipkernels.calibration.passages import Passage
from skipkernels.calibration.scoring import Score, score
from skipkernels.engine import Engine
from skipkernels.methods.method import Answer, Found, OnItem, Reading, ignore
from skipkernels.methods.setup import Setup
from skipkernels.methods.work import UnreadMap, Work
from skipkernels.skipping.policy import Policy, policy_from_dict


class EngineMethod:
    """Decodes on the engine. ``policy_of`` gives the policy of each ``max_batch_size`` prompts or passages."""

    def __init__(self, engine: Engine, policy_of: Callable[[int], Policy]) -> None:
        self._engine = engine
        self._policy_of = policy_of

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] | None = None,
        on_item: OnItem = ignore,
    ) -> list[Answer]:
        engine, batches, answers = self._engine, [], []
        try:
            # all at once, so that a row whose answer ends takes the next prompt
            for number, start in enumerate(range(0, len(prompts), engine.max_batch_size)):
                batches.append(
                    engine.begin(
                        [list(prompt) for prompt in prompts[start : start + engine.max_batch_size]],
                        max_new_tokens=max_new_tokens,
                        stop=stop,
                        eos_token_ids=eos_token_ids,
                        policy=self._policy_of(number),
                    )
                )
            for batch in batches:
                answers += [Answer(g.token_ids, g.text, self._work(g.unread_map)) for g in batch.results()]
                on_item(len(batch.rows))
        finally:
            for batch in batches:
                batch.end()
        return answers

    def score(
        self,
        passages: Sequence[Passage],
        *,
        reference: Sequence[Reading] | None = None,
        keep_log_probs: bool = False,
        on_item: OnItem = ignore,
    ) -> list[Reading]:
        engine, readings = self._engine, []
        for number, start in enumerate(range(0, len(passages), engine.max_batch_size)):
            batch = slice(start, start + engine.max_batch_size)
            scores = score(
                engine,
                passages[batch],
                self._policy_of(number),
                # score reads only all_log_probs of a reference
                reference=None if reference is None else cast("Sequence[Score]", reference[batch]),
                keep_log_probs=keep_log_probs,
            )
            readings += [
                Reading(s.argmax, s.log_probs, s.kl, s.all_log_probs, self._work(s.unread_map)) for s in scores
            ]
            on_item(len(scores))
        return readings

    def decode_alone(self, prompt: Sequence[int], new_tokens: int) -> tuple[float, Work]:
        """Seconds of the decode steps after the first token of a prompt that is the only one, and the work."""
        (generation,) = self._one_row.generate(
            [list(prompt)], max_new_tokens=new_tokens, eos_token_ids=(), policy=self._policy_of(0)
        )
        return sum(generation.seconds_per_token[1:]), self._work(generation.unread_map)

    @cached_property
    def _one_row(self) -> Engine:
        return self._engine if self._engine.max_batch_size == 1 else self._engine.with_rows(1)

    def _work(self, unread_map: UnreadMap) -> Work:
        return Work.of_ffns(self._engine.weights, unread_map)


class PolicyKind:
    """Base of the methods that consist of one policy."""

    def build(self, setup: Setup, found: Found) -> EngineMethod:
        policy = policy_from_dict(found["policy"])
        return EngineMethod(setup.engine, lambda batch: policy)
