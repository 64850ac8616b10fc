"""A tiny checkpoint on disk and two ways to call the command line."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from skipkernels.cli import app
from tests.models import byte_tokenizer, tiny_module

LAYERS = 10
PROSE = "".join(
    f"Line {number}: the quick brown fox jumps over {number * 7919 % 1000} lazy dogs.\n" for number in range(60)
)


def save_checkpoint(folder: Path, seed: int = 0) -> Path:
    tiny_module(seed=seed, num_hidden_layers=LAYERS).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Llama of ten layers and a tokenizer of bytes."""
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A text file that is long enough to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(PROSE)
    return str(path)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Calls the command line in this process, in an empty folder, 100 columns wide."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *words: CliRunner().invoke(app, list(words))


def run_process(*words: str, **options: object) -> "subprocess.CompletedProcess[str]":
    """Calls it as a user does."""
    return subprocess.run(
        [sys.executable, "-c", "from skipkernels.cli import main; main()", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
        timeout=120,
        check=False,
    )
