"""What a step takes, by its rows and what they have cached."""

from typing import Any

import pytest

from skipkernels.modality.errors import ProfileError
from skipkernels.modality.step_times import StepTimes

FIELDS: dict[str, Any] = {"positions": 10, "position_ms": 0.5, "prompt_ms": 1.0, "prompt_rows": 8.0}
STEPS = StepTimes(((1, 8.0), (2, 9.0), (6, 17.0)), **FIELDS)


@pytest.mark.parametrize(
    ("rows", "positions", "expected"),
    [(1, 10, 8.0), (2, 20, 9.0), (4, 40, 13.0), (6, 60, 17.0), (12, 120, 34.0), (1, 30, 18.0), (2, 10, 4.0)],
)
def test_between_the_profiled_numbers_times_are_interpolated(rows: int, positions: int, expected: float) -> None:
    assert STEPS.step_ms(rows, positions) == pytest.approx(expected)


def test_however_short_the_caches_a_step_takes_something() -> None:
    assert STEPS.step_ms(1, 0) == 4.0


@pytest.mark.parametrize(
    ("decode_ms", "changed"),
    [
        ((), {}),
        (((2, 9.0),), {}),
        (((1, 8.0), (1, 9.0)), {}),
        (((1, 0.0),), {}),
        (((1, 8.0),), {"prompt_rows": 0.5}),
        (((1, 8.0),), {"position_ms": -1.0}),
        (((1, float("nan")),), {}),
        (((1, 8.0),), {"prompt_ms": float("inf")}),
    ],
)
def test_impossible_times_are_refused(decode_ms: Any, changed: dict[str, float]) -> None:
    with pytest.raises(ProfileError):
        StepTimes(decode_ms, **FIELDS | changed)
