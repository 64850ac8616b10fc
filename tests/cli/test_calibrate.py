"""``calibrate``: a file that the engine takes for this model and for no other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from skipkernels import Engine, SkipPolicy
from skipkernels.policy_file import load_policy
from tests.cli.conftest import LAYERS, save_checkpoint

Run = Callable[..., Result]
SIZES = ["--new-tokens", "40", "--prompt-tokens", "8", "--passages", "12", "--warmup-tokens", "5"]


def test_the_written_policy_serves_its_model_and_no_other(
    run: Run, checkpoint: str, prose: str, tmp_path: Path
) -> None:
    result = run("calibrate", checkpoint, "--skip-ratio", "0.3", "--text", prose, "--plot", "curve.png", *SIZES)
    assert result.exit_code == 0, result.output
    assert "wrote skip_policy.json and curve.png" in result.stdout
    for part in ("FFNs skipped", "top-1 agreement", "perplexity", "Holds for 40 generated tokens"):
        assert part in result.stdout
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    engine = Engine.from_pretrained(checkpoint, policy="skip_policy.json")
    assert isinstance(engine.policy, SkipPolicy)
    words = ["Hello", "--policy", "skip_policy.json", "--max-new-tokens", "40", "--no-compare", "--json"]
    generated = run("generate", checkpoint, *words)
    assert json.loads(generated.stdout)["skip_ratio"] == pytest.approx(0.3, abs=0.2)
    other = run("generate", str(save_checkpoint(tmp_path / "other", seed=1)), *words)
    assert other.exit_code == 1
    assert "was calibrated for model" in other.stderr


def test_json_says_what_was_measured(run: Run, checkpoint: str, prose: str) -> None:
    result = run("calibrate", checkpoint, "--text", prose, "--out", "mine.json", "--span", "2", "--json", *SIZES)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    values = json.loads(line)
    assert values["policy"]["span"] == 2
    assert values["policy"] == load_policy("mine.json").to_dict() | {"layer_thresholds": None}
    assert values["measured"]["new_tokens"] == 40
    assert len(values["measured"]["similarity"]["mean"]) == LAYERS
    assert values["reached"] == (abs(values["measured"]["search"]["skip_ratio"] - 0.25) <= 0.01)


def test_a_policy_beside_the_model_is_used_by_itself(run: Run, prose: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    out = str(model / "skip_policy.json")
    assert run("calibrate", str(model), "--text", prose, "--out", out, *SIZES).exit_code == 0
    values = json.loads(run("generate", str(model), "Hello", "--max-new-tokens", "4", "--json").stdout)
    assert values["policy"]["kind"] == "similarity"


def test_the_file_that_cannot_be_written_is_an_error(run: Run, checkpoint: str, prose: str) -> None:
    result = run("calibrate", checkpoint, "--text", prose, "--out", "no/such/policy.json", *SIZES)
    assert result.exit_code == 1
    assert "no/such/policy.json" in result.stderr.splitlines()[-1]
