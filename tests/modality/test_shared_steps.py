"""Simulated machines whose requests share steps, against a step-by-step account."""

import math
from dataclasses import replace

import numpy as np
import pytest

from skipkernels.modality.arrival import Arrival
from skipkernels.modality.job import Job, Request
from skipkernels.modality.shared_steps import SharedSteps
from skipkernels.modality.simulator import simulate
from skipkernels.modality.step_times import StepTimes
from skipkernels.workloads.arrivals import poisson
from tests.modality.profiles import entry, profile_of

SLOTS = 3
STEPS = StepTimes(((1, 8.0), (3, 12.0)), positions=0, position_ms=0.01, prompt_ms=0.5, prompt_rows=8.0)


def request(prompt: int, new: int) -> Request:
    return Request({"audio": 0}, prompt_tokens=prompt, new_tokens=new)


def ends(steps: SharedSteps) -> dict[int, float]:
    found: dict[int, float] = {}
    while (now_ms := steps.next_ms()) < math.inf:
        found |= dict.fromkeys(steps.advance(now_ms), now_ms)
    return found


def test_alone_a_request_takes_its_prompt_and_its_steps() -> None:
    steps = SharedSteps([replace(STEPS, position_ms=0.0)], 1)
    steps.add(0, 0, request(16, 10), (0.0, 0), 5.0)
    assert ends(steps) == {0: pytest.approx(5.0 + (8.0 + 16 * 0.5) + 9 * 8.0)}


def test_a_longer_cache_makes_longer_steps() -> None:
    steps = SharedSteps([STEPS], 1)
    steps.add(0, 0, request(1000, 65), (0.0, 0), 0.0)
    assert ends(steps) == {0: pytest.approx(8.0 + 500.0 + 64 * (8.0 + 10.0), rel=0.02)}


def test_a_prompt_slows_who_decodes_and_does_not_stop_them() -> None:
    steps = SharedSteps([replace(STEPS, position_ms=0.0)], 1)
    steps.add(0, 0, request(0, 101), (0.0, 0), 0.0)
    steps.advance(0.0)
    steps.add(1, 0, request(80, 1000), (0.0, 1), 0.0)
    found = ends(steps)
    # 4 ms to the next step; 10 steps with 8 prompt rows each; then both decode
    assert found[0] == pytest.approx(4.0 + 10 * (8.0 + 8 * 0.5) + (100 - 10 - 0.5) * 10.0)


def test_machines_do_not_wait_for_each_other() -> None:
    steps = SharedSteps([replace(STEPS, position_ms=0.0)], 2)
    for worker in range(2):
        steps.add(worker, 0, request(0, 11), (0.0, worker), 0.0)
    assert ends(steps) == {0: pytest.approx(80.0), 1: pytest.approx(80.0)}


def test_a_simulation_is_that_of_single_steps() -> None:
    """The same arrivals, step by step: everybody who runs at its beginning gets a token at its end."""
    rng = np.random.default_rng(1)
    times = poisson(6.5, 300, rng)
    tokens = rng.integers(4, 60, len(times))
    steps = replace(STEPS, position_ms=0.0)
    profile = profile_of(replace(entry("audio", 0.9, 300.0), steps=steps))
    arrivals = [Arrival(float(at), Job([request(8, int(new))])) for at, new in zip(times, tokens, strict=True)]
    outcomes = simulate(arrivals, profile, workers=SLOTS, slots=SLOTS)
    told = [outcome.answer.time_ms for outcome in outcomes if outcome.answer is not None]

    now_ms, came, waiting, running, took = 0.0, 0, list[int](), dict[int, int](), dict[int, float]()
    while len(took) < len(times):
        if not running and not waiting and times[came] > now_ms:
            now_ms = float(times[came])
        while came < len(times) and times[came] <= now_ms:
            waiting.append(came)
            came += 1
        joined = [waiting.pop(0) for _ in range(min(len(waiting), SLOTS - len(running)))]
        now_ms += (steps.step_ms(len(running), 0) if running else 8.0) + 8 * 0.5 * len(joined)
        running = {job: left - 1 for job, left in running.items()} | {job: int(tokens[job]) - 1 for job in joined}
        for job in [job for job, left in running.items() if left == 0]:
            took[job] = now_ms - times[job]
            del running[job]
    assert np.mean(told) == pytest.approx(np.mean(list(took.values())), rel=0.05)
    assert np.quantile(told, 0.99) == pytest.approx(np.quantile(list(took.values()), 0.99), rel=0.1)
