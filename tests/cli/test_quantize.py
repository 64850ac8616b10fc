"""``skipkernels quantize`` and ``--dtype``: what they print, write and refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from typer.testing import Result

from tests.models import byte_tokenizer, tiny_module

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_module(hidden_size=64, intermediate_size=96).save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_file_is_written_and_runs(run: Run, folder: str, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    result = run("quantize", folder, "--type", "q4_0", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "bits a weight; tensors: 9 in f32, 29 in q4_0, 1 in q8_0" in " ".join(result.stderr.split())
    result = run("quantize", folder, "--type", "q4_0", "--out", str(out))
    assert result.exit_code == 1
    assert "exists; give another name, or --force to replace it" in result.stderr
    result = run("quantize", folder, "--type", "q8_0", "--out", str(out), "--force", "--json")
    document = json.loads(result.stdout)
    assert document["tensors"] == {"q8_0": 30, "f32": 9}
    assert document["bytes"] == out.stat().st_size
    for model, dtype in ((str(out), []), (folder, ["--dtype", "q5_0"])):
        result = run("generate", model, "abc", "--max-new-tokens", "4", "--json", "--no-compare", *dtype)
        assert json.loads(result.stdout)["new_tokens"] == 4


def test_a_quantised_model_is_calibrated_and_decodes_with_neurons_left_out(run: Run, folder: str) -> None:
    result = run("generate", folder, "abc", "--dtype", "q8_0", "--skip-ratio", "0.2", "--max-new-tokens", "9", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["unread_ratio"] > 0.05
