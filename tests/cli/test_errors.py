"""Every error is one line on stderr with an exit code; a traceback comes only when asked for."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from skipkernels.cli.app import INTERRUPTED
from tests.cli.conftest import run_process

Run = Callable[..., Result]


def assert_one_line(result: Result, code: int, *parts: str) -> None:
    """Before it there may be what was being done."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    *doing, line = result.stderr.splitlines()
    assert all(one.endswith(" ...") for one in doing)
    assert line.startswith("error: ")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["frobnicate"], "No such command"),
        (["generate"], "Missing argument"),
        (["generate", "MODEL", "x", "--frobnicate"], "No such option"),
        (["generate", "MODEL", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "MODEL", "x", "--dense", "--policy", "a.json"], "--dense and --policy exclude each other"),
        (["generate", "MODEL", "x", "--policy", "a.json", "--skip-ratio", "0.2"], "--policy and --skip-ratio"),
        (["generate", "MODEL", "x", "--dense", "--threshold", "0.9"], "--dense excludes --threshold"),
        (["generate", "MODEL", "x", "--skip-ratio", "0.2", "--threshold", "0.9"], "excludes --threshold"),
        (["generate", "MODEL", "x", "--text", "a.txt"], "--skip-ratio"),
        (["trace", "MODEL", "x", "--threshold", "0.9", "--span", "two"], "'all' or a number"),
        (["calibrate", "MODEL", "--span", "-1"], "'all' or a number"),
        (["calibrate", "MODEL", "--skip-ratio", "much"], "--skip-ratio"),
        (["--frobnicate"], "No such option"),
    ],
)
def test_a_wrong_command_line_ends_with_2(run: Run, checkpoint: str, words: list[str], part: str) -> None:
    assert_one_line(run(*[checkpoint if word == "MODEL" else word for word in words]), 2, part)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["generate", "./nowhere", "x"], ["nowhere", "no such folder"]),
        (["trace", "./nowhere", "x"], ["no such folder"]),
        (["calibrate", "./nowhere"], ["no such folder"]),
        (["generate", "MODEL", "x", "--dtype", "int3"], ["int3", "fp32, bf16, fp16"]),
        (["generate", "MODEL", "x", "--executor", "gpu"], ["gpu", "cpu"]),
        (["generate", "MODEL", "x", "--threshold", "2"], ["[-1, 1]", "2.0"]),
        (["generate", "MODEL", "x", "--threshold", "0.9", "--span", "0"], ["span", "0"]),
        (["generate", "MODEL", "x", "--threshold", "0.9", "--first-dense-layers", "9"], ["leave nothing to skip"]),
        (["generate", "MODEL", "x", "--threshold", "0.9", "--batch-rule", "none"], ["batch_rule", "majority"]),
        (["generate", "MODEL", "x", "--temperature", "-1"], ["temperature"]),
        (["generate", "MODEL", "x", "--max-new-tokens", "1000", "--dense"], ["max_new_tokens=1000"]),
        (["generate", "MODEL", "x", "--max-seq-len", "9999"], ["max_seq_len", "512"]),
        (["generate", "MODEL", "x" * 600, "--dense"], ["601", "512"]),
        (["generate", "MODEL", "x", "--chat", "--dense"], ["chat template"]),
        (["generate", "MODEL", "x", "--policy", "none.json"], ["none.json", "cannot be read"]),
        (["generate", "MODEL", "x", "--policy", "broken.json"], ["broken.json", "not JSON"]),
        (["generate", "MODEL", "x", "--skip-ratio", "0.2", "--text", "none.txt"], ["none.txt", "cannot be read"]),
        (["calibrate", "MODEL", "--text", "none.txt"], ["none.txt", "cannot be read"]),
        (["calibrate", "MODEL", "--text", "empty.txt", "--text", "empty.txt"], ["empty.txt", "given twice"]),
        (["calibrate", "MODEL", "--text", "binary.txt"], ["binary.txt", "UTF-8"]),
        (["calibrate", "MODEL", "--text", "empty.txt"], ["0 tokens", "at least 320"]),
        (["calibrate", "MODEL", "--text", "broken.json", "--skip-ratio", "2"], ["(0, 1)"]),
    ],
)
def test_what_cannot_be_done_ends_with_1(run: Run, checkpoint: str, words: list[str], parts: list[str]) -> None:
    Path("broken.json").write_text("{")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("empty.txt").write_text("")
    assert_one_line(run(*[checkpoint if word == "MODEL" else word for word in words]), 1, *parts)


def test_debug_shows_the_traceback_wherever_it_stands(run: Run) -> None:
    for words in (["--debug", "trace", "./nowhere", "x"], ["trace", "./nowhere", "x", "--debug"]):
        result = run(*words)
        assert result.exit_code == 1
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ")


def test_a_picture_that_cannot_be_written_is_an_error(run: Run, checkpoint: str) -> None:
    result = run("trace", checkpoint, "x", "--threshold", "0.9", "--max-new-tokens", "4", "--png", "no/such/folder.png")
    assert_one_line(result, 1, "no/such/folder.png", "cannot be written")


def test_a_picture_without_matplotlib_says_what_to_install(
    run: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert_one_line(run("trace", checkpoint, "x", "--png", "map.png"), 1, "pip install skipkernels[plot]")
    assert_one_line(run("calibrate", checkpoint, "--plot", "curve.png"), 1, "pip install skipkernels[plot]")


def test_a_bug_is_one_line_too(run: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipkernels.calibration.trace.render", lambda *_: 1 / 0)
    assert_one_line(run("trace", checkpoint, "x", "--max-new-tokens", "2", "--dense"), 1, "bug", "--debug")


def test_an_interruption_ends_with_130(run: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipkernels.calibration.trace.render", interrupted)
    result = run("trace", checkpoint, "x", "--max-new-tokens", "2", "--dense")
    assert result.exit_code == INTERRUPTED == 130
    assert result.stderr == "interrupted\n"


def test_a_process_ends_the_same_way() -> None:
    result = run_process("generate", "./nowhere", "x", "--json")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "error: ./nowhere: no such folder\n"


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = "import sys; import skipkernels.cli; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"
