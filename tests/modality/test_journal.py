"""A journal goes on where a killed measurement was, and with no other one."""

from pathlib import Path

import pytest

from skipkernels.modality.errors import ProfileError
from skipkernels.modality.journal import Journal

HEADER = {"model": "toy", "rounds": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "journal", HEADER)
    for number in range(3):
        journal.add({"number": number})
    return tmp_path / "journal"


def test_entries_survive(path: Path) -> None:
    assert [entry["number"] for entry in Journal(path, HEADER).entries] == [0, 1, 2]


@pytest.mark.parametrize("cut", range(1, 15))
def test_a_line_that_was_cut_off_is_dropped(path: Path, cut: int) -> None:
    text = path.read_text()
    path.write_text(text[:-cut])
    journal = Journal(path, HEADER)
    assert [entry["number"] for entry in journal.entries] == ([0, 1, 2] if cut == 1 else [0, 1])
    journal.add({"number": 7})
    assert Journal(path, HEADER).entries[-1] == {"number": 7}


def test_a_header_that_was_cut_off_starts_over(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text('{"model": "t')
    assert Journal(tmp_path / "journal", HEADER).entries == []


def test_another_measurements_journal_is_refused(path: Path) -> None:
    with pytest.raises(ProfileError, match=r"another measurement \(it differs in rounds\); delete it"):
        Journal(path, {**HEADER, "rounds": 4})
    path.write_text("not\njson\n")
    with pytest.raises(ProfileError, match="line 1: is not JSON"):
        Journal(path, HEADER)


def test_a_complete_one_leaves_no_file(path: Path) -> None:
    Journal(path, HEADER).close()
    assert not path.exists()
    journal = Journal(None, HEADER)
    journal.add({"number": 1})
    journal.close()
    assert journal.entries == [{"number": 1}]
