"""Every mistake in a file of items is an error that names the line."""

from pathlib import Path

import pytest

from skipkernels.errors import RequestError
from skipkernels.evaluation.jsonl import digest, read_jsonl

FIELDS = {"article": str, "turns": list}
GOOD = '{"article": "a", "turns": [], "more": 1}'


def write(folder: Path, *lines: str) -> Path:
    path = folder / "items.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_objects_come_with_all_their_fields(tmp_path: Path) -> None:
    # a line separator inside a string ends no line
    path = write(tmp_path, GOOD, "", '{"article": "b\u2028c", "turns": [1]}', "")
    assert read_jsonl(path, FIELDS) == [
        {"article": "a", "turns": [], "more": 1},
        {"article": "b\u2028c", "turns": [1]},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "items.jsonl, line 3: is not JSON"),
        ("[1]", "line 3: expected an object with 'article', 'turns', got list"),
        ('{"turns": []}', "line 3: the field 'article' is missing; expected 'article', 'turns'"),
        ('{"article": null, "turns": []}', "line 3: the field 'article' must be a text, got null"),
        ('{"article": "a", "turns": "b"}', "line 3: the field 'turns' must be a list, got a text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("[", r"\[")):
        read_jsonl(write(tmp_path, GOOD, "", line, GOOD), FIELDS)


def test_an_empty_file_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is empty; expected one JSON object per line with 'article'"):
        read_jsonl(write(tmp_path, "", ""), FIELDS)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none.jsonl: cannot be read \(No such file"):
        read_jsonl(tmp_path / "none.jsonl", FIELDS)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(RequestError, match="is not UTF-8"):
        read_jsonl(binary, FIELDS)


def test_a_digest_changes_with_the_text() -> None:
    assert digest("a") == digest("a")
    assert digest("a") != digest("b")
    assert len(digest("a")) == 12
