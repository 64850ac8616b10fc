"""lm-evaluation-harness's own client for completions gives the scores that this project's adapter gives."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.engine import Engine
from tests.server.http.running import running
from tests.server.http.test_interface import engine, real_service  # noqa: F401  # a fixture

pytest.importorskip("lm_eval")
pytest.importorskip("aiohttp", reason="the harness's clients need lm-eval[api]")
pytest.importorskip("tenacity", reason="the harness's clients need lm-eval[api]")

from lm_eval.models.openai_completions import LocalCompletionsAPI

from skipkernels.integrations.lm_eval import MethodLM, TaskManager, simple_evaluate
from skipkernels.methods.method import FULL
from skipkernels.methods.methods import METHODS
from skipkernels.methods.setup import Setup
from tests.models import random_prompt

QUESTIONS = 12


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A multiple choice, and a generation."""
    rows = [{"question": f"Is {n * n} even?", "answer": n % 2, "text": f"line {n}"} for n in range(QUESTIONS)]
    (tmp_path / "data.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.json'}\ntest_split: test\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: local_choice\n{source}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: answer\ndoc_to_choice: ["yes", "no"]\n'
    )
    (tmp_path / "write.yaml").write_text(
        f"task: local_write\n{source}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{text}}"\n'
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 9\n"
    )
    return tmp_path


@pytest.fixture
def client(engine: Engine, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Iterator[LocalCompletionsAPI]:  # noqa: F811
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with running(real_service(engine)) as server:
        yield LocalCompletionsAPI(
            model="tiny",
            base_url=f"{server.url}/v1/completions",
            tokenizer=str(tmp_path / "tokenizer"),
            tokenizer_backend="huggingface",
            max_length=engine.max_seq_len,
            add_bos_token=True,
        )


def adapter(engine: Engine) -> MethodLM:  # noqa: F811
    setup = Setup(engine, [random_prompt(2000)])
    return MethodLM(engine, METHODS[FULL].build(setup, METHODS[FULL].find(setup, 0.0, [])))


def samples_of(lm: Any, task: str, tasks: Path) -> tuple[dict[str, Any], list[Any]]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return found["results"][task], [sample["filtered_resps"] for sample in samples]


def test_both_score_choices_alike(client: LocalCompletionsAPI, engine: Engine, tasks: Path) -> None:  # noqa: F811
    theirs, told = samples_of(client, "local_choice", tasks)
    ours, expected = samples_of(adapter(engine), "local_choice", tasks)
    assert theirs["acc,none"] == ours["acc,none"]
    assert len(told) == QUESTIONS
    for own, other in zip(told, expected, strict=True):
        for (value, greedy), (wanted, is_greedy) in zip(own, other, strict=True):
            assert float(value) == pytest.approx(float(wanted), abs=1e-3)
            assert str(greedy) == str(is_greedy)


def test_both_write_alike(client: LocalCompletionsAPI, engine: Engine, tasks: Path) -> None:  # noqa: F811
    _, told = samples_of(client, "local_write", tasks)
    _, expected = samples_of(adapter(engine), "local_write", tasks)
    assert told == expected
    assert any(text for (text,) in told)
