"""Matching: finds the setting at which a method skips the wanted ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from skipkernels.methods.method import Progress, Reading
from skipkernels.methods.work import Work

CLOSE_ENOUGH = 0.003
_RUNS = 16


def match(
    measure: Callable[[float], float], wanted: float, low: float, high: float, progress: Progress
) -> tuple[float, float]:
    """Bisects between two settings for the one whose measured ratio is closest to ``wanted``.

    Args:
        measure: the ratio at a setting; it falls as the setting grows.
        low, high: settings that skip too much and too little.

    Returns:
        The setting, and its measured ratio.
    """
    measured: dict[float, float] = {}
    for run in range(_RUNS):
        setting = (low + high) / 2
        measured[setting] = measure(setting)
        progress(f"matching the ratio: {measured[setting]:.1%}", (run + 1) / _RUNS)
        if abs(measured[setting] - wanted) <= CLOSE_ENOUGH:
            break
        low, high = (setting, high) if measured[setting] > wanted else (low, setting)
    return min(measured.items(), key=lambda entry: abs(entry[1] - wanted))


def skip_ratio(readings: Iterable[Reading]) -> float:
    """The ratio of skipped FFNs over all readings."""
    return sum((reading.work for reading in readings), Work()).ffn_skip_ratio
