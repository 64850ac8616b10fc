"""``eval --suite paper``: the folder's files become tasks, and what is missing is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import Result

from skipkernels.cli.eval_suite import FILES, SuiteOptions
from skipkernels.cli.eval_tasks import TaskOptions
from skipkernels.errors import RequestError

Run = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / FILES["factoids"]).write_text("".join(f"What is {n}? | n{n}\n" for n in range(8)))
    rows = [{"goal": f"do {n}", "sol1": "this", "sol2": "that"} for n in range(6)]
    (folder / FILES["choices"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "piqa-valid-labels.lst").write_text("0\n1\n" * 3)
    return folder


def test_what_is_there_is_measured_and_what_is_missing_is_named(
    run: Run, checkpoint: str, prose: str, data: Path
) -> None:
    words = ["--suite", "paper", "--data", str(data), "--quick", "--methods", "full,fixed", "--text", prose]
    sizes = ["--limit", "2", "--passages", "4", "--prompt-tokens", "8", "--new-tokens", "12", "--threads", "1"]
    result = run("eval", checkpoint, *words, *sizes, "--json", "out.json")
    assert result.exit_code == 0, result.output
    written = json.loads(Path("out.json").read_text())
    assert {cell["task"] for cell in written["cells"]} == {"factoids", "choices", "perplexity", "agreement", "speed"}
    assert {cell["ratio"] for cell in written["cells"]} == {0.0, 0.24}
    assert "left out" in result.stderr
    assert FILES["summaries"] in result.stderr
    assert FILES["factoids"] not in result.stderr


def test_what_is_given_stays(data: Path, tmp_path: Path) -> None:
    suite = SuiteOptions("paper", data)
    own = tmp_path / "own.txt"
    tasks, missing = suite.applied(TaskOptions(factoids=own, tasks="choices", limit=3))
    assert (tasks.factoids, tasks.tasks, tasks.limit) == (own, "choices", 3)
    assert tasks.choices == data / FILES["choices"]
    assert missing == [FILES[name] for name in ("summaries", "questions", "text")]


def test_a_wrong_suite_is_refused(tmp_path: Path) -> None:
    for wrong in ({"suite": "other", "data": tmp_path}, {"suite": "paper"}, {"data": tmp_path}, {"quick": True}):
        with pytest.raises(typer.BadParameter):
            SuiteOptions(**wrong)
    with pytest.raises(RequestError, match="holds none of"):
        SuiteOptions("paper", tmp_path).applied(TaskOptions())
    with pytest.raises(RequestError, match="is no folder"):
        SuiteOptions("paper", tmp_path / "nothing").applied(TaskOptions())
