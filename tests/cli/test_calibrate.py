"""``calibrate``: a file that the engine takes for this model and for no other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from skipkernels import Engine, SkipPolicy
from skipkernels.calibration.verification import Margin
from skipkernels.cli.calibrate import margin_sentence
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
    for part in ("skipped", "top-1", "perplexity", "Holds for 40 generated tokens"):
        assert part in text
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


def test_baselines_stand_beside_the_policy_with_a_verdict(run: Run, checkpoint: str, prose: str) -> None:
    words = [
        "calibrate",
        checkpoint,
        "--skip-ratio",
        "0.2",
        "--text",
        prose,
        "--span",
        "2",
        "--first-dense-layers",
        "2",
        *SIZES,
    ]
    result = run(*words)
    assert result.exit_code == 0, result.output
    measured = json.loads(Path("skip_policy.json").read_text())["measured"]
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(" ")]  # the table, not the sentences
    assert [row[:1] for row in rows if row[:1] in (["dense"], ["calibrated"], ["fixed"], ["random"])] == [
        ["dense"],
        ["calibrated"],
        ["fixed"],
        ["fixed"],
        ["random"],
    ]
    text = " ".join(result.stdout.split())
    for margin, baseline in zip(measured["margins"], ("a fixed choice of layers", "a random choice"), strict=True):
        assert (
            f"skipped the policy {margin['verdict']} {baseline}: its KL from dense is {abs(margin['kl']):.4f}" in text
        )


@pytest.mark.parametrize(
    ("margin", "sentence"),
    [
        (
            Margin("fixed", 0.2, 0.03, 0.01, 0.05),
            "At 20.0% skipped the policy [bold]beats[/] a fixed choice of layers: its KL from dense is 0.0300 nats "
            "lower (95 % interval 0.0100 to 0.0500).",
        ),
        (
            Margin("random", 0.19, -0.03, -0.05, -0.01),
            "At 20.0% against 19.0% skipped the policy [bold]loses to[/] a random choice: its KL from dense is 0.0300 "
            "nats higher (95 % interval 0.0100 to 0.0500).",
        ),
        (
            Margin("fixed", 0.2, -0.01, -0.03, 0.02),
            "At 20.0% skipped the policy [bold]is level with[/] a fixed choice of layers: its KL from dense is 0.0100 "
            "nats higher (95 % interval -0.0200 to 0.0300).",
        ),
    ],
)
def test_a_margin_in_words(margin: Margin, sentence: str) -> None:
    assert margin_sentence(margin, 0.2) == sentence


def test_thresholds_per_layer_are_kept_drawn_and_used(run: Run, checkpoint: str, prose: str) -> None:
    words = [
        "--span",
        "2",
        "--first-dense-layers",
        "2",
        "--last-dense-layers",
        "2",
        "--per-layer",
        "--plot",
        "curve.png",
        *SIZES,
    ]
    result = run("calibrate", checkpoint, "--skip-ratio", "0.2", "--text", prose, *words)
    assert result.exit_code == 0, result.output
    assert Path("curve.png").read_bytes().startswith(b"\x89PNG")
    policy = load_policy("skip_policy.json")
    assert isinstance(policy, SkipPolicy)
    assert policy.layer_thresholds is not None
    assert len(policy.layer_thresholds) == LAYERS
    generated = run("generate", checkpoint, "Hello", "--policy", "skip_policy.json", "--max-new-tokens", "40", "--json")
    assert json.loads(generated.stdout)["skip_ratio"] == pytest.approx(0.2, abs=0.2)


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
