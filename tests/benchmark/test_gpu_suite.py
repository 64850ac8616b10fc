"""The script for machines with a GPU, as far as it runs without one: its options, its time budget, its summary."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def suite(*options: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "bench/gpu_suite.sh", *options]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    )


@pytest.mark.parametrize("options", [["--only", "kernels,warp"], ["--fast"]])
def test_what_it_does_not_know_is_refused(options: list[str]) -> None:
    result = suite(*options)
    assert result.returncode == 2
    assert "unknown" in result.stderr


def test_parts_without_time_are_named_and_the_summary_is_written(tmp_path: Path) -> None:
    result = suite("--budget", "0", "--out", str(tmp_path))
    assert result.returncode == 1
    for part in ("build", "first", "kernels", "decode", "modes", "prefetch", "test", "sanitizer"):
        assert f"{part}: left out, the time is spent" in result.stdout
    assert json.loads((tmp_path / "suite.json").read_text()) == {}


def test_the_summary_shows_every_kind_of_row(tmp_path: Path) -> None:
    (tmp_path / "first.json").write_text('{"IF node": {"unit": "us", "median": 1.5, "p20": 1, "p80": 2}, "sms": 4}')
    kernel = {"op": "lm_head", "shapes": "s", "batch_size": 1, "kv_len": 8, "us": 2.0, "gb_per_s": 4000.0}
    kernel |= {"bandwidth_fraction": 0.9, "speedup_vs_torch": 1.2}
    decode = {"system": "skipkernels", "batch_size": 1, "ffn_skip_ratio": 0.25, "ms_per_token": 0.5}
    decode |= {"bandwidth_fraction": 0.8, "speedup_vs_dense": 1.2, "ideal_speedup": 1.25}
    prefetch = {"shapes": "s", "policy": "p", "prefetch_mb": 8, "us_per_step": 99.0}
    for name, row in {"kernels": kernel, "decode": decode, "prefetch": prefetch}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": [row]}))
    (tmp_path / "cut.json").write_text('{"rows": [')
    command = [sys.executable, "bench/gpu/summary.py", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for part in ("IF node", "lm_head", "1.20x torch", "skip 0.250", "8 MB"):
        assert part in printed
    assert set(json.loads((tmp_path / "suite.json").read_text())) == {"first", "kernels", "decode", "prefetch", "cut"}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not in PATH")
def test_the_first_measurements_compile(tmp_path: Path) -> None:
    sources = ["bench/gpu/first_measurements.cu", "csrc/cuda/graph.cpp", "csrc/cuda/condition.cu"]
    command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Icsrc", *sources]
    subprocess.run([*command, "-o", str(tmp_path / "first")], cwd=ROOT, check=True)
