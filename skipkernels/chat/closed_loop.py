"""What a request takes while others share its steps, measured as a server runs them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice

from skipkernels.chat.engine_worker import EngineModel, submit
from skipkernels.chat.progress import progress_of
from skipkernels.decoding.handle import Handle
from skipkernels.decoding.loop import STEPS_AT_ONCE
from skipkernels.modality.strategy import Inputs, Strategy


def closed_loop_ms(model: EngineModel, inputs: Sequence[Inputs], strategy: Strategy, size: int) -> float:
    """Milliseconds of a request while ``size`` of them are in flight, each of which is followed by another when it
    ends. A batch that begins together would read its prompts in a few large steps; on a server they come one by one,
    and each makes some steps of the others longer.

    The first ones are cut to even parts of their length, so that they end one after the other.

    Args:
        inputs: of ``2 * size - 1`` requests.
    """
    waiting = iter(inputs)
    began = time.perf_counter()
    running = []
    for number, one in enumerate(islice(waiting, size), 1):
        tokens = math.ceil(one["text"].max_new_tokens * number / size)
        running.append(submit(model, one, strategy, max_new_tokens=tokens))
    ends: list[float] = []
    try:
        while len(ends) < size and not any(progress_of(one).given_up for one in inputs):
            model.engine.loop.step(STEPS_AT_ONCE)
            for handle in _ended(running):
                running.remove(handle)
                ends.append(time.perf_counter())
                running += [submit(model, one, strategy) for one in islice(waiting, 1)]
    finally:
        for handle in running:
            handle.cancel(ended_ok=True)
    if len(ends) < 2 or ends[-1] == ends[0]:
        return (time.perf_counter() - began) * 1e3
    return (ends[-1] - ends[0]) * 1e3 * size / (len(ends) - 1)


def _ended(running: Sequence[Handle]) -> Iterator[Handle]:
    for handle in list(running):
        handle.take_chunks()
        if not handle.running:
            yield handle
