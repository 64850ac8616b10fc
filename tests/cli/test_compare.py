"""``compare``: a table of differences, and exit code 1 where one is too large."""

import json
from collections.abc import Callable

import pytest
from typer.testing import Result

from skipkernels.program import reference
from skipkernels.program.table import Instruction

Run = Callable[..., Result]


def test_an_executor_that_is_right(run: Run, checkpoint: str):
    result = run("compare", checkpoint, "The quick", "--max-new-tokens", "3", "--dtype", "fp32", "--tolerance", "1e-5")
    assert result.exit_code == 0, result.output
    assert "no difference beyond 1e-05" in result.stdout
    assert "down_proj_add" in result.stdout


def test_one_that_is_not(run: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch):
    right = reference.REFERENCE["lm_head"]

    def wrong(ins: Instruction) -> None:
        right(ins)
        ins.tensors["logits"].mul_(2)

    monkeypatch.setitem(reference.REFERENCE, "lm_head", wrong)
    result = run("compare", checkpoint, "The quick", "--max-new-tokens", "3", "--json")
    assert result.exit_code == 1, result.output
    document = json.loads(result.stdout)
    assert document["first_beyond"]["op"] == "lm_head"
    assert document["first_beyond"]["relative"] == pytest.approx(0.5, abs=0.01)


def test_the_reference_beside_itself_is_refused(run: Run, checkpoint: str):
    result = run("compare", checkpoint, "The quick", "--executor", "reference")
    assert result.exit_code == 1
    assert "leave --executor out" in result.output
