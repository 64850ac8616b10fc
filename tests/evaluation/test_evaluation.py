"""The evaluation: which cells are filled in, what is kept, and how it goes on."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError
from skipkernels.evaluation.evaluation import Entry, evaluate
from skipkernels.evaluation.plot import plot_quality
from skipkernels.evaluation.report import group_table, tables, unreachable
from skipkernels.evaluation.results_file import ResultsFile
from skipkernels.evaluation.task import Outcome, Task, Unfinished
from skipkernels.methods.method import Found, Method, OnItem, Progress, ignore
from skipkernels.methods.setup import Setup
from skipkernels.support.console import table
from tests.evaluation.fakes import SHARE, FakeFull, FakeKind, FakeTask

RIGHT = {"full": 4, "fake@0.1": 3, "fake@0.3": 1}


def new_file(path: Path, tasks: Sequence[Task], *, resume: bool = False) -> ResultsFile:
    settings = {"tasks": {task.name: task.settings for task in tasks}}
    return ResultsFile(path, settings=settings, environment={"commit": "abc", "date": "today"}, resume=resume)


def plan(kind: FakeKind | None = None) -> list[Entry]:
    return [Entry(FakeFull(), [0.0]), Entry(kind or FakeKind(), [0.1, 0.3])]


def test_every_method_ratio_and_task_has_a_cell(setup: Setup, tmp_path: Path) -> None:
    task = FakeTask(RIGHT)
    results = new_file(tmp_path / "out.json", [task])
    seen: list[tuple[str, float]] = []
    assert evaluate(setup, plan(), [task], results, lambda stage, share: seen.append((stage, share))) == []
    assert [(c["method"], c["ratio"]) for c in results.cells] == [("full", 0.0), ("fake", 0.1), ("fake", 0.3)]
    last = results.cells[2]
    assert last["metrics"]["share right"]["value"] == 0.25
    assert last["relative_to_full"]["share right"]["value"] == 0.25
    assert last["items"]["share right"] == {"sums": [1, 0, 0, 0], "counts": [1, 1, 1, 1]}
    assert {group: v["share right"]["value"] for group, v in last["groups"].items()} == {"a": 0.5, "b": 0.0}
    assert last["groups"]["a"]["items"] == 2
    assert (last["ffn_skip_ratio"], last["layer_bytes_saved"]) == (0.25, 0.15)
    assert (last["found"], last["source"], last["commit"]) == ({"ratio": 0.3}, "nowhere", "abc")
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_all_methods_of_a_task_are_found_before_one_runs(setup: Setup, tmp_path: Path) -> None:
    """A search takes the cache for itself; between two runs it would throw their prompts out."""
    steps: list[str] = []

    class Watched(FakeKind):
        def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
            steps.append("find")
            return super().find(setup, ratio, alike, progress)

    class Task(FakeTask):
        def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
            steps.append("run")
            return super().run(method, label, on_item)

    task = Task(RIGHT)
    results = new_file(tmp_path / "out.json", [task])
    evaluate(setup, plan(Watched()), [task], results)
    assert steps == ["find", "find", "run", "run", "run"]
    assert all(cell["find_s"] >= 0 and cell["run_s"] >= 0 for cell in results.cells)


def test_a_resumed_evaluation_measures_only_what_is_missing(setup: Setup, tmp_path: Path) -> None:
    class Interrupted(FakeTask):
        def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
            if label.startswith("fake@0.3"):
                raise KeyboardInterrupt
            return super().run(method, label, on_item)

    kind, task = FakeKind(), Interrupted(RIGHT)
    with pytest.raises(KeyboardInterrupt):
        evaluate(setup, plan(kind), [task], new_file(tmp_path / "out.json", [task]))
    assert kind.found == [0.1, 0.3]
    again, rest = FakeKind(), FakeTask(RIGHT)
    results = new_file(tmp_path / "out.json", [rest], resume=True)
    evaluate(setup, plan(again), [rest], results)
    assert [label.partition("-")[0] for label in rest.labels] == ["fake@0.3"]
    assert again.found == []  # what was found before the interruption is remembered
    assert len(results.cells) == 3


def test_what_cannot_be_reached_is_said_and_the_rest_measured(setup: Setup, tmp_path: Path) -> None:
    class Limited(FakeKind):
        def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
            if ratio > 0.2:
                raise PolicyError("at most 0.200")
            return super().find(setup, ratio, alike, progress)

    task = FakeTask(RIGHT)
    results = new_file(tmp_path / "out.json", [task])
    evaluate(setup, plan(Limited()), [task], results)
    assert results.cells[2]["unreachable"] == "at most 0.200"
    assert list(unreachable(results.cells)) == ["fake task, fake 30%: at most 0.200"]
    assert [len(rows) for _, rows in tables(results.cells, task.name, task.metrics)] == [2]


def test_an_unfinished_task_is_reported_and_has_no_cell(setup: Setup, tmp_path: Path) -> None:
    class Waiting(FakeTask):
        name = "waiting"

        def run(self, method: Method, label: str, on_item: OnItem = ignore) -> Outcome:
            raise Unfinished("nobody there")

    tasks: list[Task] = [Waiting(RIGHT), FakeTask(RIGHT)]
    results = new_file(tmp_path / "out.json", tasks)
    unfinished = evaluate(setup, plan(), tasks, results)
    assert [str(error) for error in unfinished] == ["nobody there"] * 3
    assert {cell["task"] for cell in results.cells} == {"fake task"}


def test_files_of_another_policy_have_another_name(setup: Setup, tmp_path: Path) -> None:
    class Other(FakeKind):
        def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
            return {"ratio": ratio, "other": True}

    labels = []
    for number, kind in enumerate((FakeKind(), FakeKind(), Other())):
        task = FakeTask(RIGHT)
        evaluate(setup, [Entry(kind, [0.1])], [task], new_file(tmp_path / f"{number}.json", [task]))
        labels += task.labels
    assert labels[0] == labels[1] != labels[2]
    assert all(label.startswith("fake@0.1-") for label in labels)


def test_tables_state_both_savings_and_the_interval(setup: Setup, tmp_path: Path) -> None:
    task = FakeTask(RIGHT)
    results = new_file(tmp_path / "out.json", [task])
    evaluate(setup, plan(), [task], results)
    ((headings, rows),) = tables(results.cells, task.name, task.metrics)
    assert headings == ["method", "at", "FFN", "bytes", "share right", "of full"]
    assert rows[0] == ["full", "", "25.0%", "15.0%", "100.0% (100.0..100.0)", "100.0% (100.0..100.0)"]
    assert rows[1][:4] == ["fake", "10%", "25.0%", "15.0%"]
    assert rows[1][4].startswith("75.0% (")
    kinds = group_table(results.cells, task.name, SHARE)
    assert kinds == (
        "share right, % by kind at 30%",
        (["kind", "items", "full", "fake"], [["a", "2", "100", "50"], ["b", "2", "100", "0"]]),
    )
    shown = table(*headings)
    for row in rows:
        shown.add_row(*row)
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    assert "…" not in capture.get()


def test_the_picture_is_a_png(setup: Setup, tmp_path: Path) -> None:
    task = FakeTask(RIGHT)
    results = new_file(tmp_path / "out.json", [task])
    evaluate(setup, plan(), [task], results)
    plot_quality(results.cells, [(task.name, SHARE)] * 4, tmp_path / "picture.png", "a title")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
