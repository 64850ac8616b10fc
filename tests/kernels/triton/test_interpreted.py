"""Runs the tests of the folder ``interpreted`` in a process whose kernels are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"


def run_interpreted(path: Path, marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "2", "-p", "no:cacheprovider", "-m", marked, str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]


@pytest.mark.serial
@pytest.mark.timeout(900)
def test_kernels_agree_with_the_reference() -> None:
    run_interpreted(FOLDER, "not slow")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["test_blocks.py", "test_programs.py", "test_sample.py", "test_skip_gate.py"])
def test_kernels_agree_in_long_sweeps(name: str) -> None:
    run_interpreted(FOLDER / name, "slow")
