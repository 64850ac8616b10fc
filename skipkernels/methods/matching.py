"""Matching: finds the setting at which a method skips the wanted ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from skipkernels.methods.method import Progress, Reading
from skipkernels.methods.work import Work

CLOSE_ENOUGH = 0.003
_RUNS = 16
_FIRST_STEP = 0.02  # of the whole range; a policy that was tuned on other text is rarely farther off
_STEPS = 3  # then the end is tried: it may not be reachable at all
_MARGIN = 0.1  # of what is left: as near to its ends as no setting is tried


def match(
    measure: Callable[[float], float], wanted: float, low: float, high: float, progress: Progress
) -> tuple[float, float]:
    """Looks between two settings for the one whose measured ratio is closest to ``wanted``: from the middle in growing
    steps, and once the ratio lies between two measured ones, on the line through them.

    Args:
        measure: the ratio at a setting, a whole decode; it falls as the setting grows.
        low, high: settings that skip too much and too little.

    Returns:
        The setting, and its measured ratio.
    """
    measured: dict[float, float] = {}
    setting, step = (low + high) / 2, _FIRST_STEP * (high - low)
    for run in range(_RUNS):
        measured[setting] = ratio = measure(setting)
        progress(f"matching the ratio: {ratio:.1%}", (run + 1) / _RUNS)
        if abs(ratio - wanted) <= CLOSE_ENOUGH:
            break
        low, high = (setting, high) if ratio > wanted else (low, setting)
        if low == high:  # the end, and not enough
            break
        if low in measured and high in measured:
            setting = _between(low, high, measured, wanted)
        elif len(measured) == _STEPS:
            setting = high if ratio > wanted else low
        else:
            setting = setting + step if ratio > wanted else setting - step
            setting, step = setting if low < setting < high else (low + high) / 2, 2 * step
    return min(measured.items(), key=lambda entry: abs(entry[1] - wanted))


def _between(low: float, high: float, measured: Mapping[float, float], wanted: float) -> float:
    """Where the line through two measured settings meets ``wanted``, but not at their edge."""
    span = measured[low] - measured[high]
    share = (measured[low] - wanted) / span if span > 0 else 0.5
    return low + (high - low) * min(max(share, _MARGIN), 1 - _MARGIN)


def skip_ratio(readings: Iterable[Reading]) -> float:
    """The ratio of skipped FFNs over all readings."""
    return sum((reading.work for reading in readings), Work()).ffn_skip_ratio
