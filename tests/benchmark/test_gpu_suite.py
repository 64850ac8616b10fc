"""The suite for machines with a GPU, as far as it runs without one: dry, from end to end, with peers that misbehave."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.peers import measure_peers
from skipkernels.executors.kernel_options import SWITCHES

ROOT = Path(__file__).parents[2]
PARTS = ["versions", "build", "first", "ops", "tokens", "decode", "kernels", "blocks", "neurons", "timeline"]
PARTS += ["switches", "memcheck", "peers", "engine", "triton"]


def suite(*options: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = ["bash", "bench/gpu_suite.sh", *options]
    path = f"{Path(shutil.which('nvcc') or '/bin/sh').parent}:/usr/bin:/bin"
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PATH": path, "PYTHON": python})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "kernels,warp"], "unknown part warp; there are versions,build"),
        (["--fast"], "unknown option --fast"),
        (["--out"], "--out needs a value"),
        (["--seconds", "soon"], "--seconds takes a whole number, got soon"),
    ],
)
def test_what_it_does_not_know_is_refused(options: list[str], message: str) -> None:
    result = suite(*options)
    assert result.returncode == 2
    assert message in result.stderr


def test_parts_without_time_are_named_and_the_summary_is_written(tmp_path: Path) -> None:
    result = suite("--seconds", "0", "--out", str(tmp_path))
    assert result.returncode == 1
    for part in PARTS:
        assert f"{part}: left out, the time is spent" in result.stdout
    suite_file = json.loads((tmp_path / "suite.json").read_text())
    assert [row["part"] for row in suite_file["rows"] if "left_out" in row] == PARTS


STUB = """#!/bin/bash
# Stands for Python: a part that fails, one that hangs and cannot be asked to end, and others that write a row.
case "$*" in
    *"measure.py decode"*) echo "it broke" >&2; exit 3 ;;
    *"measure.py kernels"*) trap "" TERM; while true; do sleep 1; done ;;
    *measure.py*) shift 2; [ "$1" = --rows ] && echo '{"part": "row of a part"}' >>"$2" ;;
    *summary.py*) exec "%s" "$@" ;;
esac
"""


def test_a_part_that_fails_or_hangs_costs_the_others_nothing(tmp_path: Path) -> None:
    stub, out = tmp_path / "python", tmp_path / "out"
    stub.write_text(STUB % sys.executable)
    stub.chmod(0o755)
    began = time.monotonic()
    options = ["--dry-run", "--seconds", "60", "--out", str(out)]
    result = suite(*options, python=str(stub))
    assert time.monotonic() - began < 60
    ends = {row["part"]: row for row in rows_of(out) if "status" in row}
    failed = {part: row["status"] for part, row in ends.items() if row["status"]}
    assert failed == {"decode": 3, "kernels": 137}  # killed, for it does not end when it is asked
    assert list(ends) == PARTS
    assert ends["kernels"]["seconds"] <= ends["kernels"]["limit"] + 6
    assert len([row for row in rows_of(out) if row["part"] == "row of a part"]) == 7
    assert "it broke" in (out / "suite.log").read_text()
    assert result.returncode == 1


def test_a_peer_that_fails_or_hangs_is_a_row(tmp_path: Path) -> None:
    program = tmp_path / "peer.py"
    program.write_text(
        "import sys, time\n"
        "name, rows = sys.argv[3], sys.argv[5]\n"
        "open(rows, 'a').write('{\"ours\": \"%s\"}\\n' % name)\n"
        "time.sleep(3600 * (name == 'hanging'))\n"
        "sys.exit('it broke' if name == 'failing' else 0)\n"
    )
    began = time.monotonic()
    measure_peers(["failing", "hanging", "fine"], program, tmp_path / "rows.jsonl", 8.0, dry=False)
    assert time.monotonic() - began < 8.0
    rows = rows_of(tmp_path)
    assert [row["ours"] for row in rows if "ours" in row] == ["failing", "hanging", "fine"]
    errors = {row["peer"]: row["error"] for row in rows if "error" in row}
    assert errors["failing"] == "it broke"
    assert errors["hanging"].startswith("not done after ")
    assert len(errors) == 2


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], float]:
    folder, began = tmp_path_factory.mktemp("suite"), time.monotonic()
    options = ["--dry-run", "--seconds", str(SECONDS), "--peers", "failing,hanging,transformers"]
    result = suite(*options, "--out", str(folder))
    return folder, result, time.monotonic() - began


SECONDS = 900
"""Much longer than it takes, but for the peers: theirs is a share of it, and one of them uses up its part."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
class TestDryRun:
    def test_every_part_starts_and_writes_its_rows(
        self, dry_run: tuple[Path, subprocess.CompletedProcess[str], float]
    ) -> None:
        folder, result, seconds = dry_run
        assert seconds < SECONDS + 10
        rows = rows_of(folder)
        ends = {row["part"]: row for row in rows if "status" in row}
        log = (folder / "suite.log").read_text()
        assert {part: row["status"] for part, row in ends.items()} == dict.fromkeys(PARTS, 0), log[-3000:]
        assert all(row["seconds"] <= row["limit"] + 6 for row in ends.values())
        measured = {part: [row for row in rows if row["part"] == part and "status" not in row] for part in PARTS}
        assert measured["versions"][0]["environment"]["packages"]["torch"]
        assert len(measured["first"]) > 20
        assert all(row["same_tokens"] for row in measured["tokens"])
        assert measured["decode"][0]["policy"] == "dense"
        assert all(row["floor_ms"] > 0 and row["commit"] for row in measured["decode"])
        assert {row["op"] for row in measured["kernels"]} >= {"lm_head", "skip_gate"}
        assert {row["format"] for row in measured["blocks"]} == {"q8_0", "q4_0", "q4_k"}
        assert {row.get("op") for row in measured["blocks"]} >= {"gate_up_act", "lm_head", "embed"}
        assert {row["policy"] for row in measured["blocks"] if "policy" in row} >= {"dense"}
        of_neurons = {row["op"] for row in measured["neurons"] if "op" in row}
        assert of_neurons >= {"gate_proj_act", "select_neurons", "up_proj_mul", "down_proj_neurons_add"}
        assert {row["variant"] for row in measured["neurons"] if "variant" in row} >= {"dense", "40.0% of the neurons"}
        assert {row["op"] for row in measured["timeline"]} >= {"lm_head", "advance"}
        variants = {row["variant"] for row in measured["switches"]}
        assert variants >= {"all on", "all off", "prefetch 8 MB", *(f"without {name}" for name in SWITCHES)}
        assert result.returncode == 0

    def test_peers_that_fail_or_hang_are_rows_and_cost_the_others_nothing(
        self, dry_run: tuple[Path, subprocess.CompletedProcess[str], float]
    ) -> None:
        rows = [row for row in rows_of(dry_run[0]) if row["part"] == "peers"]
        errors = {row["peer"]: row["error"] for row in rows if "error" in row}
        assert errors["failing"] == "RuntimeError: this peer fails"
        assert errors["hanging"].startswith("not done after ")
        (transformers,) = [row for row in rows if row.get("system") == "transformers"]
        assert transformers["ms_per_token"] > 0
        assert any(row.get("system") == "skipkernels" and row["peer"] == "failing" for row in rows)

    def test_at_most_eight_files_come_back(self, dry_run: tuple[Path, subprocess.CompletedProcess[str], float]) -> None:
        names = {path.name for path in dry_run[0].iterdir()}
        assert names == {"rows.jsonl", "suite.log", "suite.json", "summary.txt"}

    def test_the_summary_shows_every_kind_of_row(
        self, dry_run: tuple[Path, subprocess.CompletedProcess[str], float]
    ) -> None:
        printed = dry_run[1].stdout
        for piece in ("IF node with its setter", "lm_head", "x torch", "floor", "prefetch 8 MB", "the same tokens"):
            assert piece in printed
        assert "failing: RuntimeError: this peer fails" in printed


def test_a_row_that_was_cut_off_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"part": "decode", "stat')
    command = [sys.executable, "bench/gpu/summary.py", str(tmp_path)]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 'cut off: {"part": "decode", "stat' in printed


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not in PATH")
def test_the_first_measurements_compile(tmp_path: Path) -> None:
    sources = [
        "bench/gpu/first_measurements.cu",
        "csrc/cuda/graph.cpp",
        "csrc/cuda/device.cpp",
        "csrc/cuda/condition.cu",
    ]
    command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-Icsrc", *sources]
    subprocess.run([*command, "-o", str(tmp_path / "first")], cwd=ROOT, check=True)


def test_the_gpu_tests_are_as_many_as_their_budget_was_made_for() -> None:
    from tests.gpu.conftest import CASES

    options = "-q -c bench/gpu/pytest.ini --rootdir=. --confcutdir=tests/gpu -p no:cacheprovider --collect-only"
    command = [sys.executable, "-m", "pytest", *options.split(), "tests/gpu"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {kernels: len(re.findall(rf"\[[^]]*\b{kernels}\b", listed)) for kernels in CASES} == CASES
