"""The table of kinds is whole: every kind has a report, and the module it names tests something."""

import ast
import re
from pathlib import Path

import pytest

from tests.never_wrong.kinds import KINDS, Kind

HERE = Path(__file__).parent


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_kind_has_its_reports_and_tests(kind: Kind) -> None:
    assert kind.reports
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", report) for report in kind.reports)
    tree = ast.parse((HERE / f"test_{kind.module}.py").read_text(encoding="utf-8"))
    assert any(isinstance(node, ast.FunctionDef) and node.name.startswith("test_") for node in tree.body)


def test_kinds_are_listed_once() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    reports = [report for kind in KINDS for report in kind.reports]
    assert len(set(reports)) == len(reports)
