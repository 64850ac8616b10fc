"""The profiler on a model whose times, memory and errors are known."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipkernels.errors import DeviceError
from skipkernels.modality.errors import ProfileError
from skipkernels.modality.profile import Profile
from skipkernels.modality.profiler import Sample, measure_profile
from skipkernels.modality.strategy import Inputs, Strategy, all_strategies
from skipkernels.support.memory import peak_memory_bytes

MIB = 1 << 20


class Sleeper:
    """Takes 1 ms and 2 ms more for each request with video, 0.5 ms with audio alone; is wrong without video on every
    fourth sample."""

    name, fingerprint, device, dtype = "sleeper", "s-1", "cpu", "fp32"
    modalities = ("audio", "video")
    strategies: tuple[Strategy, ...] = all_strategies(("audio", "video"))[:2]
    mib = 0

    def __init__(self, *, killed_after: int | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.killed_after = killed_after

    def run(self, batch: Sequence[Inputs], strategy: Strategy) -> Sequence[Any]:
        if len(self.calls) == self.killed_after:
            raise KeyboardInterrupt
        self.calls.append((strategy.name, len(batch)))
        held = np.ones(len(batch) * self.mib * MIB, dtype=np.uint8)
        video = "video" in strategy.modalities
        time.sleep((1.0 + len(batch) * (2.0 if video else 0.5)) / 1e3)
        del held
        return [inputs["audio"] if video or inputs["audio"] % 4 else -1 for inputs in batch]

    def score(self, output: Any, expected: Any) -> float:
        return float(output == expected)


SAMPLES = [Sample({"audio": number, "video": number}, number) for number in range(20)]
QUICK: dict[str, Any] = {"batch_sizes": (1, 4), "rounds": 3, "memory": False}


def test_times_and_accuracies_are_measured() -> None:
    stages: list[tuple[str, float]] = []
    profile = measure_profile(Sleeper(), SAMPLES, **QUICK, progress=lambda *stage: stages.append(stage))
    both, audio = profile.strategies
    assert (both.strategy.name, both.accuracy, both.samples) == ("audio+video@0", 1.0, 20)
    assert (audio.strategy.name, audio.accuracy) == ("audio@0", 0.75)
    for entry, request_ms in ((both, 2.0), (audio, 0.5)):
        for timing in entry.timings:
            assert timing.median_ms >= 1.0 + request_ms * timing.batch_size
            assert timing.peak_memory_bytes is None
    profile.check(Sleeper())
    shares = [share for _, share in stages]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert profile.source == "measured"


def test_turns_are_interleaved_and_first_runs_not_timed() -> None:
    model = Sleeper()
    measure_profile(model, SAMPLES, **{**QUICK, "rounds": 4})
    cells = {("audio+video@0", 1), ("audio+video@0", 4), ("audio@0", 1), ("audio@0", 4)}
    timed = model.calls[-16:]
    rounds = [timed[start : start + 4] for start in range(0, 16, 4)]
    assert all(set(one) == cells for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert set(model.calls[-20:-16]) == cells


def comparable(profile: Profile) -> list[Any]:
    return [
        (entry.strategy, entry.score_sum, [timing.batch_size for timing in entry.timings])
        for entry in profile.strategies
    ]


@pytest.mark.parametrize("killed_after", [0, 1, 7, 12, 18, 25])
def test_a_killed_profiler_goes_on(tmp_path: Path, killed_after: int) -> None:
    """Nothing is measured twice but for the warm-up, and nothing is missing."""
    journal = tmp_path / "journal"
    whole = Sleeper()
    expected = measure_profile(whole, SAMPLES, **QUICK)
    killed = Sleeper(killed_after=killed_after)
    with pytest.raises(KeyboardInterrupt):
        measure_profile(killed, SAMPLES, **QUICK, journal=journal)
    rest = Sleeper()
    assert comparable(measure_profile(rest, SAMPLES, **QUICK, journal=journal)) == comparable(expected)
    assert len(killed.calls) + len(rest.calls) <= len(whole.calls) + 4
    assert not journal.exists()


def test_memory_is_the_peak_of_each_batch_size() -> None:
    class Hungry(Sleeper):
        mib = 16

    profile = measure_profile(Hungry(), SAMPLES, batch_sizes=(1, 2, 4), rounds=2)
    for entry in profile.strategies:
        for timing in entry.timings:
            assert timing.peak_memory_bytes is not None
            # pages of the interpreter come and go beside the 16 MiB of each request
            assert timing.peak_memory_bytes / MIB == pytest.approx(16 * timing.batch_size, abs=2)
    assert profile.strategies[0].largest_batch(40 * MIB) == 2


def test_memory_is_measured_where_it_can_be() -> None:
    peak = peak_memory_bytes("cpu", lambda: np.ones(32 * MIB, dtype=np.uint8).sum())
    assert peak / MIB == pytest.approx(32, abs=2)
    with pytest.raises(DeviceError, match="can be measured on cpu and cuda, not on tpu:0"):
        peak_memory_bytes("tpu:0", lambda: None)


def test_memory_that_the_allocator_could_not_give_back_is_not_reused_unseen() -> None:
    """A mapping right behind the heap keeps malloc_trim from returning its end."""
    script = """
import ctypes, numpy as np
from skipkernels.support.memory import peak_memory_bytes
libc, MIB = ctypes.CDLL(None), 1 << 20
libc.sbrk.restype = libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
behind = -(-libc.sbrk(0) // 4096) * 4096
assert libc.mmap(behind, 4096, 0, 0x100022, -1, 0) == behind  # private, anonymous, at exactly this address
for size in (8, 16, 24):  # from now on malloc takes such sizes from the heap
    np.ones(size * MIB, dtype=np.uint8)
kept = [bytes(1000) for _ in range(20000)]
for size in (16, 16, 4):
    print(peak_memory_bytes("cpu", lambda: np.ones(size * MIB, dtype=np.uint8).sum()) / MIB)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert [float(line) for line in run.stdout.split()] == pytest.approx([16, 16, 4], abs=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": []}, "needs a sample and two rounds, got 0 and 3"),
        ({"rounds": 1}, "needs a sample and two rounds, got 20 and 1"),
        ({"batch_sizes": (2, 4)}, "must increase from 1"),
        ({"batch_sizes": (1, 4, 2)}, "must increase from 1"),
    ],
)
def test_an_impossible_measurement_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        measure_profile(Sleeper(), **{"samples": SAMPLES, **QUICK, **settings})


def test_a_metric_outside_0_and_1_is_refused() -> None:
    class Generous(Sleeper):
        def score(self, output: Any, expected: Any) -> float:
            return 1.5

    with pytest.raises(ProfileError, match=r"a score must lie in \[0, 1\], audio\+video@0 got 1.5"):
        measure_profile(Generous(), SAMPLES, **QUICK)
