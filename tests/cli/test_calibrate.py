"""``calibrate``: a file that the engine takes for this model and for no other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from skipkernels import Engine
from skipkernels.calibration.verification import Margin
from skipkernels.cli.calibrate import _KINDS as KINDS
from skipkernels.cli.calibrate import margin_sentence
from skipkernels.skipping.policy import policy_from_dict
from skipkernels.skipping.policy_file import load_policy
from tests.cli.conftest import LAYERS, save_checkpoint

Run = Callable[..., Result]
SIZES = ["--new-tokens", "40", "--prompt-tokens", "8", "--passages", "12", "--warmup-tokens", "5"]


def test_the_written_policy_serves_its_model_and_no_other(
    run: Run, checkpoint: str, prose: str, tmp_path: Path
) -> None:
    result = run("calibrate", checkpoint, "--skip-ratio", "0.3", "--text", prose, "--plot", "curve.png", *SIZES)
    assert result.exit_code == 0, result.output
    assert "wrote skip_policy.json and curve.png" in result.stdout
    text = " ".join(result.stdout.split())
    for part in ("saved", "top-1", "perplexity", "of 40 generated tokens", "won:", prose):
        assert part in text
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    engine = Engine.from_pretrained(checkpoint, policy="skip_policy.json")
    assert engine.policy == load_policy("skip_policy.json")
    words = ["Hello", "--policy", "skip_policy.json", "--max-new-tokens", "40", "--no-compare", "--json"]
    generated = run("generate", checkpoint, *words)
    assert json.loads(generated.stdout)["unread_ratio"] == pytest.approx(0.3, abs=0.2)
    other = run("generate", str(save_checkpoint(tmp_path / "other", seed=1)), *words)
    assert other.exit_code == 1
    assert "was calibrated for model" in other.stderr


def test_json_says_what_was_measured(run: Run, checkpoint: str, prose: str) -> None:
    result = run(
        "calibrate",
        checkpoint,
        "--text",
        prose,
        "--out",
        "mine.json",
        "--kinds",
        "similarity",
        "--span",
        "2",
        "--json",
        *SIZES,
    )
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    values = json.loads(line)
    assert values["policy"]["span"] == 2
    assert policy_from_dict(values["policy"]) == load_policy("mine.json")
    assert values["measured"]["new_tokens"] == 40
    assert len(values["measured"]["similarity"]["mean"]) == LAYERS
    assert values["measured"]["text"] == values["text"] == prose


def test_the_best_kind_is_written_and_no_printed_one_is_better(run: Run, checkpoint: str, prose: str) -> None:
    result = run("calibrate", checkpoint, "--skip-ratio", "0.2", "--text", prose, *SIZES)
    assert result.exit_code == 0, result.output
    measured = json.loads(Path("skip_policy.json").read_text())["measured"]
    text = " ".join(result.stdout.split())
    for other in measured["others"]:
        assert other["kind"] in text
    for margin in measured["margins"]:
        assert f"saved the policy {margin['verdict']} {KINDS[margin['against']]}: its KL from dense is" in text
    assert f"{KINDS[measured['kind']].capitalize()} won" in text


def test_a_divergence_that_is_too_large_is_a_warning_with_what_could_be_saved(
    run: Run, checkpoint: str, prose: str
) -> None:
    words = ["calibrate", checkpoint, "--skip-ratio", "0.4", "--text", prose, "--kinds", "neurons", *SIZES]
    result = run(*words, "--warn-kl", "0.0005")
    assert result.exit_code == 0, result.output
    warned = " ".join(result.stderr.split())
    assert "even the best policy costs" in warned
    affordable = json.loads(Path("skip_policy.json").read_text())["measured"]["affordable"]
    assert f"The largest saving found below it is {100 * affordable:.1f}%" in warned
    assert "warning" not in run(*words, "--warn-kl", "50").stderr


def test_the_largest_saving_within_a_divergence(run: Run, checkpoint: str, prose: str) -> None:
    result = run("calibrate", checkpoint, "--max-kl", "0.002", "--text", prose, "--kinds", "neurons", *SIZES)
    assert result.exit_code == 0, result.output
    held_out = json.loads(Path("skip_policy.json").read_text())["measured"]["held_out"]
    assert 0 < held_out["kl"] <= 0.002
    assert held_out["skip_ratio"] > 0.01
    assert run("calibrate", checkpoint, "--max-kl", "0.1", "--skip-ratio", "0.2").exit_code == 2
    assert "'blocks'" in run("calibrate", checkpoint, "--kinds", "blocks").stderr


@pytest.mark.parametrize(
    ("margin", "sentence"),
    [
        (
            Margin("fixed", 0.2, 0.03, 0.01, 0.05),
            "At 20.0% saved the policy [bold]beats[/] a fixed choice of blocks: its KL from dense is 0.0300 nats "
            "lower (95 % interval 0.0100 to 0.0500).",
        ),
        (
            Margin("random", 0.19, -0.03, -0.05, -0.01),
            "At 20.0% against 19.0% saved the policy [bold]loses to[/] a random choice of blocks: its KL from dense is "
            "0.0300 nats higher (95 % interval 0.0100 to 0.0500).",
        ),
        (
            Margin("fixed", 0.2, -0.01, -0.03, 0.02),
            "At 20.0% saved the policy [bold]is level with[/] a fixed choice of blocks: its KL from dense is 0.0100 "
            "nats higher (95 % interval -0.0200 to 0.0300).",
        ),
    ],
)
def test_a_margin_in_words(margin: Margin, sentence: str) -> None:
    assert margin_sentence(margin, 0.2) == sentence


def test_a_policy_beside_the_model_is_used_by_itself(run: Run, prose: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    out = str(model / "skip_policy.json")
    assert run("calibrate", str(model), "--text", prose, "--out", out, *SIZES).exit_code == 0
    values = json.loads(run("generate", str(model), "Hello", "--max-new-tokens", "4", "--json").stdout)
    assert policy_from_dict(values["policy"]) == load_policy(out)


def test_the_file_that_cannot_be_written_is_an_error(run: Run, checkpoint: str, prose: str) -> None:
    result = run("calibrate", checkpoint, "--text", prose, "--out", "no/such/policy.json", *SIZES)
    assert result.exit_code == 1
    assert "no/such/policy.json" in result.stderr.splitlines()[-1]
