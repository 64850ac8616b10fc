"""Simulated machines whose requests share steps: each reads its prompt, then decodes a token a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from skipkernels.modality.job import Request
from skipkernels.modality.step_times import StepTimes

_FAR = 64.0  # tokens in which steps are taken not to change by what they add to the cache
_NOTHING = 1e-6  # tokens; what rounding leaves


@dataclass(eq=False)
class _Run:
    steps: StepTimes
    order: tuple[float, int]  # in which prompts are read
    prompt_tokens: float
    prompt_left: float
    new_left: float
    begins_ms: float
    positions: float = 0.0

    @property
    def decodes(self) -> bool:
        return self.prompt_left <= _NOTHING


class SharedSteps:
    """What runs on machines with so many slots each, by worker. Times pass between two events as a fluid: how long a
    step is changes when a request comes, has read its prompt or ends.

    Args:
        steps: by strategy.
        machines: worker n is a slot of machine n modulo this.
    """

    def __init__(self, steps: Sequence[StepTimes], machines: int) -> None:
        self._steps = steps
        self._machines: list[dict[int, _Run]] = [{} for _ in range(machines)]
        self._ended_ms = [-math.inf] * machines  # the last end on each
        self._now_ms = 0.0

    def add(self, worker: int, strategy: int, request: Request, order: tuple[float, int], delay_ms: float) -> None:
        """It takes part from the next step on: at once where another one has just ended, else half a step later in the
        mean. With the last token of its prompt its first new one comes."""
        machine = worker % len(self._machines)
        runs = self._machines[machine]
        decoding = [run for run in runs.values() if run.decodes]
        between = not decoding or self._ended_ms[machine] == self._now_ms
        begins_ms = self._now_ms + delay_ms + (0.0 if between else _step_ms(decoding) / 2)
        prompt, new = float(request.prompt_tokens), request.new_tokens - 1.0
        runs[worker] = _Run(self._steps[strategy], order, prompt, prompt, new, begins_ms)

    def move(self, worker: int, strategy: int) -> None:
        self._machines[worker % len(self._machines)][worker].steps = self._steps[strategy]

    def advance(self, now_ms: float) -> list[int]:
        """At most to ``next_ms``. Returns the workers whose request has ended, and forgets them."""
        passed_ms, self._now_ms = now_ms - self._now_ms, now_ms
        ended = []
        for machine, runs in enumerate(self._machines):
            here = [run for run in runs.values() if run.begins_ms <= now_ms - passed_ms]
            head, decode_rate, prompt_rate = _rates(here)
            for run in here:
                if run.decodes:
                    run.new_left -= passed_ms * decode_rate
                    run.positions += passed_ms * decode_rate
            if head is not None:
                read = min(head.prompt_left, passed_ms * prompt_rate)
                head.prompt_left -= read
                head.positions += read
            over = [worker for worker, run in runs.items() if run.decodes and run.new_left <= _NOTHING]
            for worker in over:
                del runs[worker]
                self._ended_ms[machine] = now_ms
            ended += over
        return ended

    def next_ms(self) -> float:
        """When something changes next; infinity: nothing runs."""
        return min(map(self._next_ms, self._machines), default=math.inf)

    def _next_ms(self, runs: dict[int, _Run]) -> float:
        coming_ms = [run.begins_ms for run in runs.values() if run.begins_ms > self._now_ms]
        here = [run for run in runs.values() if run.begins_ms <= self._now_ms]
        head, decode_rate, prompt_rate = _rates(here)
        waits_ms = [min(_FAR, run.new_left) / decode_rate for run in here if run.decodes]
        if head is not None:
            waits_ms.append(head.prompt_left / prompt_rate)
        return min([*coming_ms, *(self._now_ms + ms for ms in waits_ms)], default=math.inf)


def _step_ms(decoding: Sequence[_Run]) -> float:
    """Of rows that may each leave something else out."""
    positions = sum(run.positions for run in decoding)
    return sum(run.steps.step_ms(len(decoding), positions) for run in decoding) / len(decoding)


def _rates(here: Sequence[_Run]) -> tuple[_Run | None, float, float]:
    """Whose prompt is read, new tokens of every other request, and tokens of that prompt, each a millisecond."""
    decoding = [run for run in here if run.decodes]
    head = min((run for run in here if not run.decodes), key=lambda run: run.order, default=None)
    if head is None:
        return None, 1.0 / _step_ms(decoding) if decoding else 0.0, 0.0
    times = head.steps
    if not decoding:  # as large pieces as there are
        whole_ms = times.decode_ms[0][1] + head.prompt_tokens * times.prompt_ms
        return head, 0.0, head.prompt_tokens / whole_ms
    period_ms = _step_ms(decoding) + times.prompt_rows * times.prompt_ms
    return head, 1.0 / period_ms, times.prompt_rows / period_ms
