"""When jobs come: rates, bursts, and traces that are checked line by line."""

from pathlib import Path

import numpy as np
import pytest

from skipkernels.modality.errors import JobError
from skipkernels.workloads.arrivals import as_recorded, bursty, poisson, read_trace


@pytest.mark.parametrize("process", [poisson, bursty])
def test_jobs_come_at_the_wanted_rate(process: object) -> None:
    times = process(50.0, 40_000, np.random.default_rng(0))  # type: ignore[operator]
    assert len(times) == 40_000
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert 40_000 / times[-1] * 1e3 == pytest.approx(50.0, rel=0.1)  # some 40 bursts: 10 % is two deviations


def test_poisson_counts_vary_as_much_as_their_mean_and_bursts_more() -> None:
    def dispersion(times: np.ndarray) -> float:
        counts = np.histogram(times, np.arange(0, times[-1], 1000.0))[0]
        return float(counts.var() / counts.mean())

    rng = np.random.default_rng(0)
    assert dispersion(poisson(20.0, 20_000, rng)) == pytest.approx(1.0, abs=0.15)  # 1,000 counts: a deviation is 0.045
    assert dispersion(bursty(20.0, 20_000, rng)) > 5.0


def test_bursts_are_as_many_times_faster_as_asked() -> None:
    times = bursty(20.0, 200_000, np.random.default_rng(1), burst=10.0, burst_share=0.2, burst_s=50.0)
    counts = np.histogram(times, np.arange(0, times[-1], 1000.0))[0]
    calm = 20.0 / (1 + 0.2 * 9)
    assert np.median(counts[counts < 3 * calm]) == pytest.approx(calm, abs=1)
    assert np.median(counts[counts > 5 * calm]) == pytest.approx(10 * calm, rel=0.05)


def test_a_trace_begins_at_zero(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("# seconds\n12.5\n\n12.5  # two at once\n13.75\n")
    assert read_trace(path).tolist() == [0.0, 0.0, 1250.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.0\nsoon\n", "line 2: expected seconds like 12.5, got 'soon'"),
        ("# start\n\n2.0\n1.5\n", r"line 4: 1.5 s is before the line above \(2.0 s\)"),
        ("nan\n", "line 1: a time is finite and not negative, got nan"),
        ("1.0\ninf\n", "line 2: a time is finite"),
        ("-1\n", "line 1: a time is finite and not negative, got -1"),
        ("", "holds no arrival times"),
        ("# nothing\n", "holds no arrival times"),
        ("1.0 2.0\n", "line 1: expected seconds"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    with pytest.raises(JobError, match=message):
        read_trace(path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.bin").write_bytes(b"\xff\xfe\x00")
    for name in ("trace.bin", "missing.txt"):
        with pytest.raises(JobError, match=f"{name}: cannot be read"):
            read_trace(tmp_path / name)


def test_a_trace_keeps_its_shape_at_any_rate() -> None:
    trace = np.array([0.0, 10.0, 20.0, 90.0])
    times = as_recorded(trace)(40.0, 10, np.random.default_rng(0))
    assert np.diff(times) == pytest.approx(np.array([10, 10, 70, 30, 10, 10, 70, 30, 10]) * 100 / 120)
    with pytest.raises(JobError, match="a trace of 2 arrivals at one moment has no rate"):
        as_recorded(np.zeros(2))


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused(rate: float) -> None:
    for process in (poisson, bursty, as_recorded(np.array([0.0, 1.0]))):
        with pytest.raises(JobError, match="positive number of jobs per second"):
            process(rate, 5, np.random.default_rng(0))
    with pytest.raises(JobError, match="bursts need burst >= 1"):
        bursty(1.0, 5, np.random.default_rng(0), burst_share=1.0)
