"""The results file: whole at any time, gone on with by the same command, and by no other."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipkernels.errors import RequestError
from skipkernels.evaluation.results_file import ResultsFile

SETTINGS: dict[str, Any] = {"seed": 0, "dtype": "bf16", "tasks": {"facts": {"items": 4}}}


def begin(path: Path, settings: dict[str, Any] = SETTINGS, *, resume: bool = False) -> ResultsFile:
    copy = json.loads(json.dumps(settings))
    return ResultsFile(path, settings=copy, environment={"commit": "abc"}, resume=resume)


def cell(method: str, ratio: float = 0.0, task: str = "facts") -> dict[str, Any]:
    return {"method": method, "ratio": ratio, "task": task, "metrics": {}}


def test_every_cell_is_in_the_file_as_soon_as_it_is_added(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    results = begin(path)
    assert json.loads(path.read_text())["cells"] == []
    results.add(cell("full"))
    results.add(cell("skip", 0.25))
    document = json.loads(path.read_text())
    assert document["cells"] == [cell("full"), cell("skip", 0.25)]
    assert document["environment"] == {"commit": "abc"}
    assert sum(line.startswith('{"method"') for line in path.read_text().splitlines()) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    results = begin(path)
    results.add(cell("full"))
    before = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.add(cell("skip") | {"metrics": float("nan")})
    results.cells.pop()

    def full_disk(self: Path, *_: object, **__: object) -> int:
        with self.open("w") as file:
            file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space"):
        results.add(cell("skip"))
    assert path.read_text() == before


def test_the_same_command_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    first = begin(path)
    first.document["memory"]["calibration at 0.25"] = {"kind": "similarity"}
    first.add(cell("full"))
    second = begin(path, resume=True)
    assert second.cell("full", 0.0, "facts") == cell("full")
    assert second.cell("full", 0.0, "perplexity") is None
    assert second.document["memory"] == {"calibration at 0.25": {"kind": "similarity"}}


def test_a_task_may_be_added(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    begin(path).add(cell("full"))
    begin(path, SETTINGS | {"tasks": {"perplexity": {"passages": 2}}}, resume=True)
    assert json.loads(path.read_text())["settings"]["tasks"] == {"facts": {"items": 4}, "perplexity": {"passages": 2}}


def test_a_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    begin(path).add(cell("full"))
    with pytest.raises(RequestError, match=r"out.json: exists already; give --resume to continue it"):
        begin(path)
    assert len(json.loads(path.read_text())["cells"]) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "made with seed = 0, this command has 1"),
        ({"dtype": None}, "made with dtype = 'bf16', this command has None"),
        ({"tasks": {"facts": {"items": 5}}}, "made with items = 4, this command has 5"),
        ({"threads": 3}, "made with threads = None, this command has 3"),
    ],
)
def test_another_command_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = tmp_path / "out.json"
    begin(path)
    with pytest.raises(RequestError, match=message):
        begin(path, SETTINGS | changed, resume=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a results file"),
        ('{"format": "skipkernels.skip_policy"}', "is not a results file"),
        ('{"format": "skipkernels.quality", "version": 99}', "version 99, this release reads version 1"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "out.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        begin(path, resume=True)
