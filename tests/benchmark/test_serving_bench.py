"""The serving bench: the command on every kind of workload, and what it refuses."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from skipkernels.cli.app import app
from skipkernels.modality.profile_file import save_profile
from skipkernels.workloads.fusion import clips as fusion_clips
from skipkernels.workloads.fusion import train as fusion_train
from skipkernels.workloads.fusion.clips import ClipSource
from skipkernels.workloads.fusion.trainer import Schedule, train
from tests.cli.test_errors import assert_one_line
from tests.modality.profiles import entry, profile_of

TINY = ClipSource(segments=3, frames={"audio": 2, "video": 2})
SHAPE = {"layers": 5, "hidden": 32, "intermediate": 32, "heads": 2}
FAST = "--simulated-jobs 60 --policies full,maximize --extra-ms 120 --threads 1"


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "serving", *arguments])


def rows_of(path: Path) -> Sequence[dict[str, Any]]:
    rows: Sequence[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


@pytest.fixture
def tiny_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command trains a minimal classifier on minimal clips."""
    monkeypatch.setattr(
        fusion_train,
        "train",
        lambda source, schedule, seed, shape, after_step: train(TINY, schedule, seed, SHAPE, after_step),
    )
    monkeypatch.setattr(fusion_clips, "ClipSource", lambda: TINY)


def test_the_fusion_workload_runs_on_a_real_server(tiny_clips: None, tmp_path: Path) -> None:
    out, picture, frontier = (tmp_path / name for name in ("out.json", "out.png", "frontier.png"))
    options = (
        f"--model-dir {tmp_path / 'model'} --train-steps 3 --skip-levels 0,0.2 --profile-samples 10 --profile-rounds 2 "
        f"--max-batch-size 2 --jobs 4 --overload-jobs 5 --rounds 2 --slack 0.5 {FAST} "
        "--simulated-jobs 200 --extra-ms 40"  # so many jobs at once take longer than that on any machine
    )
    result = bench(*options.split(), "--json", str(out), "--plot", str(picture), "--frontier", str(frontier))
    assert result.exit_code == 0, result.output
    assert "real over simulated" in result.stdout
    rows = rows_of(out)
    contenders = ["full", "maximize", "modalities only", "skipping only"]
    for source in ("simulated", "real"):
        for load in ("capacity", "overload"):
            listed = [row for row in rows if (row["source"], row["load"]) == (source, load)]
            assert [row["contender"] for row in listed] == contenders
    real = [row for row in rows if row["source"] == "real"]
    for row in real:
        assert row["jobs"] == (8 if row["load"] == "capacity" else 10)
        assert row["lost"] == 0
        assert 0.0 <= row["achieved_accuracy"] <= 1.0
        assert row["promise_kept"] is (row["achieved_accuracy"] >= row["required_accuracy"])
        assert row["skip_ratio"] == 0.0 or row["contender"] in ("maximize", "skipping only")
        assert set(row["deviations"]) >= {"throughput_per_s", "completion_mean_ms", "completion_p99_ms"}
        assert {"device", "versions", "commit", "date"} <= set(row)
    settings = json.loads(out.read_text())["settings"]
    assert [strategy["strategy"] for strategy in settings["strategies"]][:2] == ["audio+video@0", "audio+video@0.2"]
    assert {decision["requests"] for decision in settings["decisions"]} == {256}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (picture, frontier))
    again = bench(*options.split(), "--simulated", "--json", "-")  # neither trains nor profiles
    assert again.exit_code == 0, again.output
    assert "trained" not in again.stderr
    assert {row["source"] for row in json.loads(again.stdout)["rows"]} == {"simulated"}
    shutil.rmtree(tmp_path / "model" / "decoder")
    assert_one_line(bench(*options.split()), 1, "holds no fusion classifier")


@pytest.mark.parametrize("process", ["bursty", "trace"])
def test_profiles_are_simulated_under_any_arrivals(process: str, tmp_path: Path) -> None:
    save_profile(
        tmp_path / "profile.json",
        profile_of(entry("audio+video", 0.9, 9.0, sizes=(1, 4)), entry("audio", 0.88, 2.0, sizes=(1, 4))),
    )
    trace = tmp_path / "trace.txt"
    trace.write_text("# seconds\n0\n0.5\n0.7\n2.0\n")
    arrivals = str(trace) if process == "trace" else process
    result = bench(
        "--workload", str(tmp_path / "profile.json"), "--process", arrivals, "--slack", "0.03,0.0", *FAST.split()
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count("at the highest rate") == 2
    assert "toy, simulated" in result.stdout
    assert "real over simulated" not in result.stdout
    assert "deciding for 256 waiting requests" in result.stdout


def test_the_originals_headlines_are_simulated(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = "--workload synthetic --extra-ms 55 --simulated-jobs 250 --policies full,maximize"
    result = bench(*options.split(), "--json", str(out))
    assert result.exit_code == 0, result.output
    figures = {(row["contender"], row["load"]): row for row in rows_of(out)}
    carried = [figures[name, "capacity"]["throughput_per_s"] for name in ("full", "maximize")]
    waited = [figures[name, "overload"]["completion_mean_ms"] for name in ("full", "maximize")]
    assert carried[1] > 3.6 * carried[0]
    assert waited[0] > 11.0 * waited[1]
    assert json.loads(out.read_text())["settings"]["profile_source"].startswith("synthetic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--workload fusion", "needs --model-dir"),
        ("--workload nowhere.json", "there is no file 'nowhere.json'"),
        ("--workload synthetic --process nowhere.txt", "there is no file 'nowhere.txt'"),
        ("--workload synthetic --slack some", "--slack takes numbers"),
    ],
)
def test_a_wrong_command_line_is_refused(options: str, message: str) -> None:
    assert_one_line(bench(*options.split()), 2, message)


def test_a_bad_line_of_a_trace_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text("0.0\n1.5\nsoon\n")
    result = bench("--workload", "synthetic", "--process", str(trace))
    assert_one_line(result, 1, "trace.txt, line 3: expected seconds like 12.5, got 'soon'")


def test_an_unknown_policy_is_refused() -> None:
    assert_one_line(bench("--workload", "synthetic", "--policies", "fastest"), 1, "unknown selection policy 'fastest'")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_classifier_trains_to_the_originals_profile(tmp_path: Path) -> None:
    """Minutes of training and profiling; then promises hold on clips that nobody has seen."""
    out = tmp_path / "out.json"
    steps = Schedule().steps
    options = (
        f"--model-dir {tmp_path / 'model'} --train-steps {steps} --profile-samples 300 --profile-rounds 5 "
        "--jobs 40 --overload-jobs 40 --rounds 1 --simulated-jobs 400 --extra-ms 400 --threads 1"
    )
    result = bench(*options.split(), "--json", str(out))
    assert result.exit_code == 0, result.output
    document = json.loads(out.read_text())
    accuracy = {one["strategy"]: one["accuracy"] for one in document["settings"]["strategies"]}
    for name, reported in (("audio+video@0", 0.7432), ("audio@0", 0.7233), ("video@0", 0.6600)):
        assert accuracy[name] == pytest.approx(reported, abs=0.025)
        for level in ("0.2", "0.4"):
            assert accuracy[name.replace("@0", f"@{level}")] == pytest.approx(accuracy[name], abs=0.01)
    assert all(row["promise_kept"] for row in document["rows"] if row["source"] == "real")
