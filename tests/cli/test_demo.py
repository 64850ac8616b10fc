"""``demo``, with a tiny random model in the place of the bundled one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from skipkernels import Engine, SkipPolicy, TimingPolicy, save_policy
from skipkernels.demo.facts import FACTS_FILE, Fact, load_facts, save_facts
from skipkernels.skipping.policy import policy_from_dict
from tests.cli.conftest import PROSE, save_checkpoint

Run = Callable[..., Result]
POLICY = SkipPolicy(threshold=0.9, span=1, first_dense_layers=0, last_dense_layers=0, warmup_tokens=25)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the bundled model's."""
    folder = save_checkpoint(tmp_path / "model")
    facts = [Fact(question=f"What is {number}?", answer=str(number), topic="numbers") for number in range(500)]
    save_facts(facts, folder / FACTS_FILE)
    save_policy(
        folder / "skip_policy.json", POLICY, fingerprint=Engine.from_pretrained(folder).fingerprint, measured={}
    )
    monkeypatch.setattr("skipkernels.demo.demo_model_path", lambda: folder)
    monkeypatch.setattr("skipkernels.demo.load_facts", lambda: load_facts(folder / FACTS_FILE))
    monkeypatch.setattr("skipkernels.demo.facts.load_facts", lambda: load_facts(folder / FACTS_FILE))
    monkeypatch.setattr("skipkernels.cli.builtin_text.documentation", lambda: [PROSE])
    return folder


def test_it_shows_facts_a_story_a_map_and_figures(run: Run, model: Path) -> None:
    result = run("demo")
    assert result.exit_code == 0, result.output
    for part in (POLICY.label, "What is", "Free continuation", "◆", "tokens/s", "facts answered", "perplexity"):
        assert part in result.stdout


def test_it_measures_what_the_engine_does(run: Run, model: Path) -> None:
    result = run("demo", "--json")
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    values = json.loads(line)
    assert policy_from_dict(values["policy"]) == POLICY
    assert [speed["skip_ratio"] > 0 for speed in values["speeds"]] == [False, True]
    assert values["answers"][0] == {"right": 0, "asked": 96, "skip_ratio": 0.0}
    assert values["answers"][1]["skip_ratio"] > 0
    assert 0 < values["held_out"]["top1_agreement"] < 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "skipkernels.demo.train"),
        (lambda folder: (folder / "skip_policy.json").unlink(), "skip_policy.json: cannot be read"),
        (
            lambda folder: save_policy(
                folder / "skip_policy.json",
                TimingPolicy(0.2),
                fingerprint=Engine.from_pretrained(folder).fingerprint,
                measured={},
            ),
            "one of kind 'timing'",
        ),
    ],
)
def test_what_is_missing_is_named(run: Run, model: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(model)
    result = run("demo")
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
