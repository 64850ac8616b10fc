"""The command line about ordinary bad input: one line, no traceback, and never "a bug in skipkernels"."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from skipkernels.cli import app
from tests.models import tiny_module
from tests.never_wrong.folders import edit_json, save

EMOJI = "🦉".encode()


def command(*words: str | bytes, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [sys.executable, "-c", "from skipkernels.cli import main; main()", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=os.environ | environment,
        timeout=300,
        check=False,
    )


def assert_one_line(part: str, *words: str, code: int = 1) -> None:
    """In this process, which is quicker."""
    result = CliRunner().invoke(app, list(words))
    lines = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
    assert result.exit_code == code, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert part in lines[0]
    assert "a bug in skipkernels" not in lines[0]


@pytest.fixture(scope="module")
def owls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says nothing but owls, byte by byte."""
    folder = save(tmp_path_factory.mktemp("owls"), tokenizer=True)
    module = tiny_module()
    with torch.no_grad():
        for layer in module.model.layers:  # the residual stream is the embedding, which picks its successor
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        module.model.embed_tokens.weight.copy_(torch.nn.functional.one_hot(torch.arange(259) % 40, 40).float())
        module.lm_head.weight.zero_()
        for byte, following in zip(EMOJI, EMOJI[1:] + EMOJI[:1], strict=True):
            module.lm_head.weight[following, byte % 40] = 9.0
        module.lm_head.weight[EMOJI[0], ord("x") % 40] += 5.0
    module.save_pretrained(folder)
    return folder


def test_a_terminal_that_cannot_show_it_gets_something_else(owls: Path) -> None:
    words = ("generate", str(owls), "x", "--max-new-tokens", "8", "--dense", "--threads", "1", "--no-compare")
    plain = CliRunner().invoke(app, list(words)).stdout.strip()
    assert "🦉" in plain
    shown = "".join(character if character.isascii() else "?" for character in plain)
    for encoding in ("ascii", "cp1252"):
        result = command(*words, PYTHONIOENCODING=encoding)
        assert result.returncode == 0, result.stderr
        assert result.stdout.decode(encoding).strip() == shown
        document = command(*words, "--json", PYTHONIOENCODING=encoding)
        assert "🦉" in json.loads(document.stdout.decode(encoding))["text"]


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("tokenizer.json", "{", "its tokenizer cannot be read"),
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", b"\xff\xfe", "config.json cannot be read"),
        ("config.json", '{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}', "config.json cannot be read"),
        ("model.safetensors", "x", "cannot be read"),
        ("skip_policy.json", b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: str | bytes, part: str) -> None:
    save(tmp_path, tokenizer=True)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line(part, "generate", str(tmp_path), "x", "--max-new-tokens", "2")


def test_other_bad_input_is_one_line(owls: Path, tmp_path: Path) -> None:
    assert_one_line("not valid Unicode", "generate", str(owls), "\udcff", "--dense")
    assert_one_line("model.gguf: no such file", "generate", "model.gguf", "x")
    assert_one_line("--threads", "generate", str(owls), "x", "--threads", "100000", code=2)
    save(tmp_path, tokenizer=True)
    edit_json(tmp_path, "tokenizer_config.json", chat_template="{{ raise_exception('no') }}")
    assert_one_line("the chat template refuses", "generate", str(tmp_path), "x", "--chat", "--dense")
    edit_json(tmp_path, rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}})
    assert_one_line("one set for all layers", "generate", str(tmp_path), "x", "--dense")


def test_bytes_that_are_no_text_and_a_reader_that_has_seen_enough(owls: Path) -> None:
    result = command("generate", str(owls), b"\xff\xfe", "--dense")
    assert result.returncode == 1
    assert "not valid Unicode" in result.stderr.decode()
    words = f"{sys.executable} -c 'from skipkernels.cli import main; main()' generate {owls} x --dense --no-compare"
    piped = subprocess.run(f"{words} | true", shell=True, capture_output=True, text=True, timeout=300, check=False)
    assert "Traceback" not in piped.stderr
    assert "bug in skipkernels" not in piped.stderr
