"""``generate`` and ``trace``: the engine's own tokens, and figures that agree with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from skipkernels import Engine, NeuronPolicy, SkipPolicy, TimingPolicy, save_policy
from skipkernels.skipping.policy import policy_from_dict
from tests.cli.conftest import LAYERS, run_process

Run = Callable[..., Result]
POLICY = SkipPolicy(threshold=0.9, span=2, first_dense_layers=0, last_dense_layers=1, warmup_tokens=3)
POLICY_WORDS = [
    "--threshold",
    "0.9",
    "--span",
    "2",
    "--first-dense-layers",
    "0",
    "--last-dense-layers",
    "1",
    "--warmup-tokens",
    "3",
]


def document(result: Result) -> dict[str, Any]:
    """The only line on stdout."""
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def has_dense_row(table: str) -> bool:
    return any(line.split()[:1] == ["dense"] for line in table.splitlines())


def expected(checkpoint: str, policy: SkipPolicy = POLICY, **options: Any) -> Any:
    return Engine.from_pretrained(checkpoint, policy=policy).generate(["Hello"], **{"max_new_tokens": 30, **options})[0]


def test_the_text_streams_to_stdout_and_the_figures_to_stderr(run: Run, checkpoint: str) -> None:
    result = run("generate", checkpoint, "Hello", "--max-new-tokens", "30", *POLICY_WORDS)
    assert result.exit_code == 0
    assert result.stdout == expected(checkpoint).text + "\n"
    assert has_dense_row(result.stderr)
    for part in (POLICY.label, "tokens/s", "the dense model's speed"):
        assert part in result.stderr


def test_json_holds_what_the_engine_gives(run: Run, checkpoint: str) -> None:
    values = document(run("generate", checkpoint, "Hello", "--max-new-tokens", "30", *POLICY_WORDS, "--json"))
    generation = expected(checkpoint)
    assert values["token_ids"] == generation.token_ids
    assert values["skip_ratio"] == generation.skip_ratio > 0
    assert policy_from_dict(values["policy"]) == POLICY
    assert values["speedup"] == values["tokens_per_s"] / values["dense_tokens_per_s"]


def test_options_of_earlier_releases_work_and_are_not_listed(run: Run, checkpoint: str) -> None:
    words = ["generate", checkpoint, "Hello", "--max-new-tokens", "5", "--no-compare", "--threshold", "0.9", "--json"]
    values = document(run(*words, "--cold-start", "0", "--cold-end=1"))
    assert (values["policy"]["first_dense_layers"], values["policy"]["last_dense_layers"]) == (0, 1)
    for command in ("generate", "calibrate"):
        shown = run(command, "--help").output
        assert "--first-dense-lay" in shown
        assert "--cold" not in shown


def test_dense_has_nothing_to_compare_with(run: Run, checkpoint: str) -> None:
    values = document(run("generate", checkpoint, "Hello", "--max-new-tokens", "5", "--dense", "--json"))
    assert (values["policy"], values["skip_ratio"], values["speedup"]) == ({"kind": "dense"}, 0.0, None)


def test_no_compare_runs_once(run: Run, checkpoint: str) -> None:
    words = ["generate", checkpoint, "Hello", "--max-new-tokens", "5", "--no-compare", *POLICY_WORDS]
    assert document(run(*words, "--json"))["dense_tokens_per_s"] is None
    assert not has_dense_row(run(*words).stderr)


def test_sampling_options_reach_the_engine(run: Run, checkpoint: str) -> None:
    words = ["--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--min-p", "0.01", "--seed", "7"]
    values = [
        document(run("generate", checkpoint, "Hello", "--dense", "--max-new-tokens", "20", "--json", *words, *more))
        for more in ([], [], ["--seed", "8"], ["--repetition-penalty", "1.5"])
    ]
    texts = [tuple(value["token_ids"]) for value in values]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_a_stop_string_ends_the_text(run: Run, checkpoint: str) -> None:
    whole = document(run("generate", checkpoint, "Hello", "--dense", "--max-new-tokens", "30", "--json"))["text"]
    stop = next(character for character in whole[5:] if character.isascii() and character.isprintable())
    values = document(run("generate", checkpoint, "Hello", "--dense", "--stop", stop, "--json"))
    assert values["finish_reason"] == "stop"
    assert values["text"] == whole[: whole.index(stop)]


def test_a_policy_file_is_used_and_parameters_override_it(run: Run, checkpoint: str) -> None:
    save_policy("mine.json", POLICY, fingerprint=Engine.from_pretrained(checkpoint).fingerprint, measured={})
    words = ["generate", checkpoint, "Hello", "--max-new-tokens", "5", "--json", "--policy", "mine.json"]
    assert policy_from_dict(document(run(*words))["policy"]) == POLICY
    assert policy_from_dict(document(run(*words, "--span", "all"))["policy"]) == replace(POLICY, span=None)


def test_another_models_policy_file_is_refused(run: Run, checkpoint: str) -> None:
    save_policy("other.json", POLICY, fingerprint="0123456789abcdef", measured={})
    result = run("generate", checkpoint, "Hello", "--policy", "other.json")
    assert result.exit_code == 1
    assert "run `skipkernels calibrate` on this model" in result.stderr


def test_a_timing_policy_says_so(run: Run, checkpoint: str) -> None:
    save_policy("t.json", TimingPolicy(0.3), fingerprint=Engine.from_pretrained(checkpoint).fingerprint, measured={})
    words = ["generate", checkpoint, "Hello", "--max-new-tokens", "5", "--policy", "t.json"]
    assert "timing only" in run(*words).stderr
    assert "timing only" in document(run(*words, "--json"))["policy_label"]
    assert "timing only" in run("trace", *words[1:]).stdout


def test_skip_ratio_calibrates_first(run: Run, checkpoint: str, prose: str) -> None:
    words = ["--skip-ratio", "0.2", "--text", prose, "--span", "2", "--max-new-tokens", "100", "--no-compare", "--json"]
    result = run("generate", checkpoint, "Hello", *words)
    values = document(result)
    assert f"calibrated on {prose}" in " ".join(result.stderr.split())
    assert policy_from_dict(values["policy"]).label == values["policy_label"]
    assert 0.05 < values["unread_ratio"] < 0.35


def test_no_policy_is_dense_and_says_so(run: Run, checkpoint: str) -> None:
    result = run("generate", checkpoint, "Hello", "--max-new-tokens", "5")
    assert "every FFN runs" in result.stderr


def test_trace_shows_the_skip_map(run: Run, checkpoint: str) -> None:
    words = ["trace", checkpoint, "Hello", "--max-new-tokens", "30", *POLICY_WORDS]
    values = document(run(*words, "--json"))
    generation = expected(checkpoint)
    np.testing.assert_array_equal(values["skipped"], generation.skip_map)
    assert len(values["tokens"]) == len(values["triggered"]) == len(values["similarity"]) == 30
    printed = run(*words)
    assert printed.exit_code == 0
    assert f"{generation.skip_ratio:.1%} of the FFN bytes not read: {POLICY.label}" in printed.stdout
    assert len([line for line in printed.stdout.splitlines() if line[20 : 20 + LAYERS].strip("█◆·") == ""]) >= 30


def test_trace_draws_a_picture(run: Run, checkpoint: str) -> None:
    result = run("trace", checkpoint, "Hello", "--max-new-tokens", "12", "--png", "map.png", *POLICY_WORDS)
    assert result.exit_code == 0, result.output
    assert Path("map.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote map.png" in result.stdout


def test_a_process_prints_what_the_engine_gives(checkpoint: str) -> None:
    words = ["--max-new-tokens", "8", "--dense", "--no-compare", "--executor", "reference", "--threads", "1"]
    result = run_process("generate", checkpoint, "Hello", *words)
    assert result.returncode == 0, result.stderr
    assert result.stdout == expected(checkpoint, max_new_tokens=8, policy=SkipPolicy(threshold=1.0)).text + "\n"


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_fewer_tokens_than_the_warm_up_are_warned_of(run: Run, checkpoint: str, command: str) -> None:
    words = [command, checkpoint, "Hello", "--threshold", "0.9", "--max-new-tokens"]
    few = " ".join(run(*words, "25").stderr.split())
    assert "nothing can be left out: the policy runs the first 25 generated tokens in full" in few
    assert "nothing can be left out" not in run(*words, "26").stderr
    assert "nothing can be left out" not in run(command, checkpoint, "Hello", "--max-new-tokens", "5").stderr


def test_the_table_fits_80_columns_under_the_longest_policy(
    run: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    mixed = replace(POLICY, gate_thresholds=(0.1,) * LAYERS, product_thresholds=(0.1,) * LAYERS)
    save_policy("mine.json", mixed, fingerprint=Engine.from_pretrained(checkpoint).fingerprint, measured={})
    result = run("generate", checkpoint, "Hello", "--max-new-tokens", "30", "--policy", "mine.json")
    assert result.exit_code == 0, result.output
    heading = next(line for line in result.stderr.splitlines() if "tokens/s" in line)
    assert heading.split() == ["tokens/s", "ms/token", "not", "read"]
    assert mixed.label in " ".join(result.stderr.split())


def test_a_neuron_policy_takes_a_ratio_to_hold(run: Run, checkpoint: str, tmp_path: Path) -> None:
    policy = NeuronPolicy(product_thresholds=(0.1,) * LAYERS, warmup_tokens=1)
    fingerprint = Engine.from_pretrained(checkpoint).fingerprint
    save_policy(tmp_path / "neurons.json", policy, fingerprint=fingerprint, measured={})
    words = ["generate", checkpoint, "abc", "--policy", str(tmp_path / "neurons.json"), "--no-compare", "--json"]
    shown = document(run(*words, "--target-ratio", "0.2", "--max-new-tokens", "4"))
    assert shown["policy"]["target_ratio"] == 0.2
    refused = run(*words, "--span", "2")
    assert refused.exit_code == 2
    assert "a policy of kind 'neurons' has no span" in refused.output
