"""The scripts of examples/ run as a reader would run them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_script
from tests.real_models import smollm2_gguf

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output_of(name: str, *words: str) -> str:
    result = run_script([str(EXAMPLES / name), *words])
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_hugging_face_model() -> None:
    text = output_of("hugging_face.py")
    assert "dense:" in text
    assert "of the FFN bytes, KL" in text
    assert "skipping:" in text


def test_an_own_rule() -> None:
    lines = output_of("own_rule.py").splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["every third", "random", "similarity"]


def test_a_gguf_file_and_the_openai_client() -> None:
    pytest.importorskip("openai", reason="the openai client is not installed")
    text = output_of("gguf_and_openai.py", str(smollm2_gguf()))
    assert text.count("Paris") == 2
    assert "'strategy': 'text@0'" in text
