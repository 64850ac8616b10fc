"""What is expected of jobs to come."""

import math

import numpy as np
import pytest

from skipkernels.modality.forecast import Forecast


def test_nothing_is_expected_of_nothing() -> None:
    forecast = Forecast()
    assert forecast.taken_ms(0.0, 1e9) == 0.0
    assert forecast.patience_ms == math.inf
    for number in range(15):
        forecast.note(float(number), 10.0, 1.0)
        assert forecast.taken_ms(20.0, 1e9) == 0.0  # no rate can be told from so few
    forecast.note(15.0, 10.0, 1.0)
    assert forecast.taken_ms(20.0, 1e9) > 0.0


def test_jobs_that_keep_coming_take_their_share() -> None:
    """Counted out: jobs of 3 ms every 20 ms with deadlines of 50 or 400 ms, over the next second."""
    forecast = Forecast()
    for number in range(64):
        forecast.note(20.0 * number, 50.0 if number % 2 else 400.0, 3.0)
    now_ms = 63 * 20.0
    for until_ms in (now_ms + 40.0, now_ms + 300.0, now_ms + 1000.0):
        coming = np.arange(64, 400)
        deadlines = 20.0 * coming + np.where(coming % 2, 50.0, 400.0)
        taken_ms = 3.0 * (deadlines < until_ms).sum()
        assert forecast.taken_ms(now_ms, until_ms) == pytest.approx(taken_ms, abs=3.0)  # one job


def test_silence_is_noticed() -> None:
    forecast = Forecast()
    for number in range(20):
        forecast.note(float(number), 5.0, 1.0)
    assert forecast.taken_ms(1000.0, 1100.0) < 0.03 * forecast.taken_ms(19.0, 119.0)


def test_jobs_without_deadline_never_come_before() -> None:
    forecast = Forecast()
    for number in range(20):
        forecast.note(float(number), math.inf, 1.0)
    assert forecast.taken_ms(19.0, 1e6) == 0.0
    assert forecast.taken_ms(19.0, math.inf) == 0.0
    assert forecast.patience_ms == math.inf


def test_patience_is_that_of_the_hurried() -> None:
    forecast = Forecast()
    for wait_ms in range(1, 41):
        forecast.note(0.0, 10.0 + wait_ms, 10.0)
    forecast.note(0.0, 5.0, 10.0)  # cannot be in time: no reason to hurry
    assert forecast.patience_ms == 5.0
