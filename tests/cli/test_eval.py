"""``eval``: the whole command on a tiny model, what it writes, how it goes on, and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from skipkernels import Engine, NeuronPolicy, save_policy
from skipkernels.skipping import policy_file
from tests.models import byte_tokenizer, tiny_module

Run = Callable[..., Result]
SIZES = ["--passages", "8", "--prompt-tokens", "8", "--new-tokens", "24", "--threads", "1"]
METHODS = ["--methods", "full,skip,fixed,shortgpt", "--ratios", "0.2"]


@pytest.fixture
def facts(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"n{n}", "topic": "ab"[n % 2]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def document() -> dict[str, Any]:
    return json.loads(Path("out.json").read_text())


def test_a_command_measures_every_method_at_every_ratio(run: Run, checkpoint: str, prose: str, facts: str) -> None:
    words = ["eval", checkpoint, "--text", prose, "--facts", facts, *METHODS, *SIZES, "--json", "out.json"]
    result = run(*words, "--plot", "quality.png")
    assert result.exit_code == 0, result.output
    for part in (
        "facts",
        "exact match",
        "perplexity",
        "KL from full",
        "of full",
        "exact match, % by kind at 20%",
        "wrote out.json and quality.png",
    ):
        assert part in result.stdout
    assert "the first 1 of every answer run in full" in " ".join(result.stdout.split())
    assert Path("quality.png").read_bytes().startswith(b"\x89PNG")
    written = document()
    tasks = ("facts", "perplexity", "agreement", "generation")
    assert len(written["cells"]) == 4 * (1 + 3)
    assert {cell["task"] for cell in written["cells"]} == set(tasks)
    assert written["environment"].keys() >= {"device", "versions", "commit", "date"}
    assert written["settings"]["warmup_tokens"] == 1
    for cell in written["cells"]:
        assert cell["metrics"].keys() == cell["relative_to_full"].keys()
        if cell["task"] == "perplexity" and cell["method"] != "full":
            assert cell["ffn_skip_ratio"] == pytest.approx(cell["ratio"], abs=0.08)  # four passages
        if cell["method"] == "full":
            assert (cell["ffn_skip_ratio"], cell["layer_bytes_saved"]) == (0.0, 0.0)
    assert {cell["ratio_of"] for cell in written["cells"]} == {"nothing", "FFN bytes", "layers"}

    again = run(*words, "--resume")
    assert again.exit_code == 0, again.output
    assert document()["cells"] == written["cells"]  # times and all: nothing was measured again


def test_a_command_that_is_gone_on_with_adds_what_is_missing(run: Run, checkpoint: str, prose: str) -> None:
    words = ["eval", checkpoint, "--text", prose, *SIZES, "--tasks", "perplexity", "--json", "out.json"]
    assert run(*words, "--methods", "full").exit_code == 0
    assert run(*words, "--methods", "full,fixed", "--ratios", "0.3", "--resume").exit_code == 0
    assert [(cell["method"], cell["ratio"]) for cell in document()["cells"]] == [("full", 0.0), ("fixed", 0.3)]
    without = run(*words)
    assert without.exit_code == 1
    assert "give --resume to continue it" in without.stderr
    changed = run(*words, "--resume", "--warmup-tokens", "2")
    assert changed.exit_code == 1
    assert "made with warmup_tokens = 1, this command has 2" in changed.stderr


def test_who_interrupts_it_learns_how_to_go_on(
    run: Run, checkpoint: str, prose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipkernels.evaluation.evaluation.evaluate", interrupt)
    words = ["--tasks", "perplexity", "--methods", "full", "--json", "out.json"]
    result = run("eval", checkpoint, "--text", prose, *SIZES, *words)
    assert result.exit_code == 130
    assert "out.json holds what is finished; the same command with --resume goes on" in result.stderr


def test_json_may_go_to_stdout(run: Run, checkpoint: str, prose: str) -> None:
    words = [*SIZES, "--tasks", "perplexity", "--methods", "full", "--json", "-"]
    result = run("eval", checkpoint, "--text", prose, *words)
    (line,) = result.stdout.splitlines()
    assert json.loads(line)["cells"][0]["method"] == "full"
    assert not Path("-").exists()


def test_a_policy_of_the_package_is_named(
    run: Run, checkpoint: str, prose: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_file, "SHIPPED", tmp_path)
    fits = Engine.from_pretrained(checkpoint).fingerprint
    policy = NeuronPolicy(gate_thresholds=(0.1,) * 10, warmup_tokens=1)
    save_policy(tmp_path / "a-model.json", policy, fingerprint=fits, measured={})
    words = ["--tasks", "perplexity", "--policy", "a-model", "--methods", "neuron", "--json", "out.json"]
    result = run("eval", checkpoint, "--text", prose, *SIZES, *words)
    assert result.exit_code == 0, result.output
    assert document()["cells"][0]["found"]["policy"]["gate_thresholds"] == [0.1] * 10


@pytest.mark.parametrize(("kind", "method"), [("similarity", "skip"), ("neurons", "neuron"), ("mixed", "mixed")])
def test_a_policy_file_takes_the_place_of_the_ratios(
    run: Run, checkpoint: str, prose: str, kind: str, method: str
) -> None:
    sizes = ["--new-tokens", "24", "--prompt-tokens", "8", "--passages", "8", "--warmup-tokens", "5"]
    calibrate = ["calibrate", checkpoint, "--text", prose, "--skip-ratio", "0.2", "--kinds", kind, *sizes]
    assert run(*calibrate).exit_code == 0
    words = ["eval", checkpoint, "--text", prose, *SIZES, "--tasks", "perplexity", "--policy", "skip_policy.json"]
    result = run(*words, "--methods", method, "--json", "out.json")
    assert result.exit_code == 0, result.output
    (cell,) = document()["cells"]
    assert cell["method"] == method
    policy = json.loads(Path("skip_policy.json").read_text())["policy"]
    assert cell["found"]["policy"] == policy | {"warmup_tokens": 1}
    assert cell["ratio"] == pytest.approx(cell["ffn_skip_ratio"], abs=0.1)


def test_a_policy_of_another_grain_or_model_is_refused_before_the_work(
    run: Run, checkpoint: str, prose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skipkernels.cli.eval_tasks.TaskOptions.prepare", lambda *_, **__: pytest.fail("began"))
    words = ["eval", checkpoint, "--text", prose, *SIZES, "--tasks", "perplexity", "--policy", "mine.json"]
    save_policy("mine.json", NeuronPolicy(gate_thresholds=(0.1,) * 10), fingerprint="another", measured={})
    other_model = run(*words, "--methods", "neuron")
    assert other_model.exit_code == 1
    assert "was calibrated for another model (fingerprint another" in other_model.stderr
    with monkeypatch.context() as patch:  # not even the model is loaded for this
        patch.setattr("skipkernels.cli.models.ModelOptions.load", lambda *_, **__: pytest.fail("loaded"))
        other_grain = run(*words, "--methods", "full,skip")
    assert other_grain.exit_code == 2
    assert "a policy of the method 'neuron', which --methods full,skip lacks" in " ".join(other_grain.stderr.split())
    fits = Engine.from_pretrained(checkpoint).fingerprint
    save_policy("mine.json", NeuronPolicy(gate_thresholds=(0.1,) * 3), fingerprint=fits, measured={})
    depth = run(*words, "--methods", "neuron")
    assert depth.exit_code == 1
    assert "gate_thresholds has 3 entries, the model 10 layers" in depth.stderr


def test_a_ratio_that_cannot_be_reached_is_said_beside_the_others(run: Run, checkpoint: str, prose: str) -> None:
    words = ["--tasks", "perplexity", "--methods", "full,random", "--ratios", "0.3,0.9", *SIZES]
    result = run("eval", checkpoint, "--text", prose, *words)
    assert result.exit_code == 0, result.output
    assert "not measured: perplexity, random 90%" in " ".join(result.stderr.split())
    assert "leave at most 0.800" in " ".join(result.stderr.split())
    assert "30%" in result.stdout


def test_chat_without_its_judge_keeps_the_answers_and_fails(
    run: Run, checkpoint: str, prose: str, tmp_path: Path
) -> None:

    model = tmp_path / "chatty"
    tiny_module(num_hidden_layers=4).save_pretrained(model)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(model)
    Path("question.jsonl").write_text('{"question_id": 1, "category": "a", "turns": ["x"]}\n')
    words = ["eval", str(model), "--text", prose, "--tasks", "perplexity,chat", "--questions", "question.jsonl"]
    words += ["--answers", "answers", "--answer-tokens", "8", "--methods", "full", *SIZES, "--json", "out.json"]
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "strong"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("skipkernels.evaluation.judge._ATTEMPTS", 1)
        result = run(*words, *judge)
    assert result.exit_code == 1
    assert "gave no grade" in result.stderr.splitlines()[-1]
    assert "perplexity" in result.stdout
    assert len(list(Path("answers/model_answer").iterdir())) == 1
    assert [cell["task"] for cell in document()["cells"]] == ["perplexity"]


def test_tasks_of_the_harness(run: Run, checkpoint: str, prose: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "data.json").write_text('{"q": "a", "a": 0}\n{"q": "b", "a": 1}\n')
    (tmp_path / "choice.yaml").write_text(
        f"task: local_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/data.json\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_target: a\n'
        'doc_to_choice: ["yes", "no"]\nmetric_list:\n  - metric: acc\n'
    )
    words = ["--lm-eval", "local_choice", "--lm-eval-include", str(tmp_path), "--methods", "full,fixed"]
    result = run("eval", checkpoint, "--text", prose, *words, "--ratios", "0.3", *SIZES, "--json", "out.json")
    assert result.exit_code == 0, result.output
    cells = document()["cells"]
    assert [(cell["task"], cell["method"]) for cell in cells] == [
        ("lm-eval:local_choice", "full"),
        ("lm-eval:local_choice", "fixed"),
    ]
    assert cells[1]["ffn_skip_ratio"] > 0.1


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--ratios", "0.2,much"], 2, "numbers separated by commas"),
        (["--ratios", "1.5"], 2, "between 0 and 1, got 1.5"),
        (["--tasks", "facts,juggling"], 2, "unknown task 'juggling'; known are facts"),
        (["--resume"], 2, "--json"),
        (["--judge-url", "http://x"], 2, "--judge-model"),
        (["--warmup-tokens", "0"], 2, "--warmup-tokens"),
        (["--methods", "full,magic"], 1, "unknown method 'magic'; known are full"),
        (["--tasks", "facts"], 1, "--facts names one"),
        (["--tasks", "summarization"], 1, "--summaries names one"),
        (["--tasks", "chat"], 1, "--questions names one"),
        (["--tasks", "facts", "--facts", "none.jsonl"], 1, "none.jsonl: cannot be read"),
        (["--summaries", "broken.jsonl"], 1, "broken.jsonl, line 2: the field 'summary' is missing"),
        (["--questions", "broken.jsonl"], 1, "line 1: the field 'question_id' is missing"),
        (["--text", "empty.txt"], 1, "0 tokens; at least"),
        (["--policy", "none.json"], 1, "none.json: cannot be read"),
        (["--json", "no/such/out.json"], 1, "cannot be written"),
        (["--plot", "no/such/out.png"], 1, "cannot be written"),
        pytest.param(["--lm-eval", "no_such_task"], 1, "has no task 'no_such_task'", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_work(
    run: Run, checkpoint: str, prose: str, words: list[str], code: int, part: str
) -> None:
    Path("broken.jsonl").write_text('{"article": "a", "summary": "b"}\n{"article": "a"}\n')
    Path("empty.txt").write_text("")
    text = [] if "--text" in words else ["--text", prose]
    result = run("eval", checkpoint, *text, *SIZES, *words)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert part in line


def test_what_is_not_installed_is_named(run: Run, checkpoint: str, prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("pairs.jsonl").write_text('{"article": "a", "summary": "b"}\n')
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "skipkernels.integrations.lm_eval", raising=False)
    for words in (["--summaries", "pairs.jsonl"], ["--lm-eval", "arc_easy"]):
        result = run("eval", checkpoint, "--text", prose, *SIZES, *words)
        assert result.exit_code == 1
        assert "pip install skipkernels[eval]" in result.stderr.splitlines()[-1]
