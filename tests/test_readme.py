"""Every example of the README runs: its Python as one session, its commands in one shell."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line[:2] == "$ "]


MAKE = [command for command in commands() if command.startswith("make ")]
SKIPKERNELS = [command for command in commands() if command.startswith("skipkernels ")]


def test_every_command_is_of_a_kind_that_is_tested():
    assert MAKE
    assert SKIPKERNELS
    assert set(commands()) == {*MAKE, *SKIPKERNELS}


def test_python_examples_run_in_one_session(tmp_path):
    session = tmp_path / "session.py"
    session.write_text("\n".join(blocks("python")), encoding="utf-8")
    result = subprocess.run([sys.executable, session], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "Not Found" in result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all commands: some read what others wrote."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", SKIPKERNELS)
def test_command_runs(command, folder):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        shlex.split(command), cwd=folder, capture_output=True, text=True, timeout=280, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("command", MAKE)
def test_make_target_exists(command):
    result = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
