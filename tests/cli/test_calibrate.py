"""``calibrate``: a file that the engine takes for this model and for no other."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import Result

from skipkernels import Engine
from skipkernels.calibration.calibration import Calibration, SimilarityCurve
from skipkernels.calibration.scoring import Comparison
from skipkernels.calibration.speed import Gain
from skipkernels.calibration.tuning import Trial
from skipkernels.calibration.verification import Margin
from skipkernels.cli.calibrate import _KINDS as KINDS
from skipkernels.cli.calibrate import gain_sentence, margin_sentence, slower_warning
from skipkernels.skipping.policy import FixedPolicy, policy_from_dict
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
    assert "was calibrated for another model" in other.stderr


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
    assert "even the best policy" not in run(*words, "--warn-kl", "50").stderr


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
            Margin("fixed", 0.2, 0.03, 0.01, 0.05, 8, 1024),
            "At 20.0% saved the policy [bold]beats[/] a fixed choice of blocks: its KL from dense is 0.0300 nats "
            "lower (95 % interval 0.0100 to 0.0500, 8 passages, 1024 tokens).",
        ),
        (
            Margin("random", 0.19, -0.03, -0.05, -0.01, 8, 1024),
            "At 20.0% against 19.0% saved the policy [bold]loses to[/] a random choice of blocks: its KL from dense is "
            "0.0300 nats higher (95 % interval 0.0100 to 0.0500, 8 passages, 1024 tokens).",
        ),
        (
            Margin("fixed", 0.2, -0.01, -0.03, 0.02, 8, 1024),
            "At 20.0% saved the policy [bold]is level with[/] a fixed choice of blocks: its KL from dense is 0.0100 "
            "nats higher (95 % interval -0.0200 to 0.0300, 8 passages, 1024 tokens).",
        ),
        (
            Margin("fixed", 0.2, 0.03, 0.03, 0.03, 1, 128),
            "At 20.0% saved the policy [bold]cannot be told from[/] a fixed choice of blocks: its KL from dense is "
            "0.0300 nats lower (1 of the 4 passages that an interval takes; --passages gives more).",
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


@pytest.mark.parametrize(
    ("path", "reason"),
    [("no/such/policy.json", "there is no folder no/such"), ("taken", "it is a folder"), ("/proc/policy.json", "")],
)
def test_the_file_that_cannot_be_written_is_an_error_before_the_work(
    run: Run, checkpoint: str, prose: str, path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("taken").mkdir()
    monkeypatch.setattr("skipkernels.cli.models.ModelOptions.load", lambda *_, **__: pytest.fail("loaded"))
    result = run("calibrate", checkpoint, "--text", prose, "--out", path, *SIZES)
    assert result.exit_code == 1
    assert f"{path}: cannot be written ({reason}" in result.stderr.splitlines()[-1]


def gain(ratio: float) -> Gain:
    return Gain(100.0, 100 * ratio, 0.25, ratio, ratio - 0.01, ratio + 0.01, 128, 5)


def found_with(gains: dict[str, float]) -> Calibration:
    """Neurons best, then similarity, then fixed blocks, at the speeds given."""
    kl = {"neurons": 0.05, "similarity": 0.3, "fixed": 0.5}
    trials = [
        Trial(kind, FixedPolicy((1,)), Comparison(0.25, 0.25, 0.9, cost, 10, 9, 512, 4), (cost,) * 4, 0.25)
        for kind, cost in kl.items()
    ]
    curve = SimilarityCurve((0.9,), (0.9,), (0.9,))
    return Calibration(
        tuple(trials), tuple(trials), (), None, 0.1, curve, "text", 8, 128, 1, "", "bf16",
        gains={kind: gain(ratio) for kind, ratio in gains.items()},
    )  # fmt: skip


def test_a_policy_that_is_slower_than_dense_is_not_recommended_silently() -> None:
    slow = found_with({"neurons": 0.82, "similarity": 0.97, "fixed": 1.2})
    assert slow.faster is not None
    assert slow.faster.kind == "fixed"
    for part in (
        "no faster than the dense model (0.82x)",
        "a fixed choice of blocks: 1.20x, KL 0.500",
        "--kinds fixed",
    ):
        assert part in slower_warning(slow)
    assert slow.measured()["speed"]["neurons"]["faster"] is False
    none = found_with({"neurons": 0.82, "similarity": 0.97, "fixed": 0.99})
    assert none.faster is None
    assert "No other kind that was tried is faster at this saving; decode with --dense" in slower_warning(none)
    alone = replace(none, verified=none.verified[:1])
    assert "No other kind was tried: --kinds names more" in slower_warning(alone)
    assert gain_sentence(gain(0.82)) == (
        "Decoding one row, in turns with dense: 0.82x its speed, the median of 5 rounds of 128 tokens (0.81 to 0.83). "
        "Over all rounds, the median of the policy is 82.0 tokens/s, of dense 100.0."
    )


def test_the_speed_beside_dense_is_printed_and_kept(run: Run, checkpoint: str, prose: str) -> None:
    result = run("calibrate", checkpoint, "--skip-ratio", "0.2", "--text", prose, "--kinds", "neurons,fixed", *SIZES)
    assert result.exit_code == 0, result.output
    measured = json.loads(Path("skip_policy.json").read_text())["measured"]
    own = measured["speed"][measured["kind"]]
    text = " ".join((result.stdout + result.stderr).split())
    medians = f"{own['tokens_per_s']:.1f} tokens/s, of dense {own['dense_tokens_per_s']:.1f}"
    assert f"Over all rounds, the median of the policy is {medians}" in text
    assert ("no faster than the dense model" in text) == (not own["faster"]) == (own["ratio"] <= 1)
    assert (set(measured["speed"]) == {measured["kind"]}) == own["faster"]  # else the others are timed too


@pytest.mark.parametrize(
    "words", [("--max-kl", "0"), ("--max-kl", "nan"), ("--skip-ratio", "1.5"), ("--warn-kl", "-1")]
)
def test_a_number_out_of_range_is_refused_before_a_model_is_loaded(run: Run, words: tuple[str, str]) -> None:
    result = run("calibrate", "no-such-model", *words)
    assert result.exit_code == 1
    assert "no-such-model" not in result.output
    assert f"got {float(words[1])}" in result.output
