"""Perplexity, free generation and summarisation against figures that are known."""

import math
import sys
from pathlib import Path

import pytest
import torch

from skipkernels.errors import RequestError, SkipkernelsError
from skipkernels.passages import Passage
from skipkernels.quality.estimate import estimate
from skipkernels.quality.free_generation import FreeGeneration, common_prefix, repeated
from skipkernels.quality.methods import METHODS
from skipkernels.quality.perplexity import PERPLEXITY, Perplexity
from skipkernels.quality.setup import Setup
from skipkernels.quality.summarization import Summarization
from tests.models import random_prompt, tiny_engine, tiny_module
from tests.quality.conftest import ALIKE, LAYERS
from tests.quality.fakes import FakeMethod

PASSAGES = [Passage(tuple(random_prompt(8 + 20, seed)), 8) for seed in range(3)]


def test_perplexity_is_that_of_transformers(setup: Setup) -> None:
    module = tiny_module(num_hidden_layers=LAYERS)  # the setup's
    nats = 0.0
    with torch.inference_mode():
        for passage in PASSAGES:
            tokens = torch.tensor([passage.token_ids])
            log_probs = module(tokens).logits.log_softmax(-1)[0, 7:-1]
            nats -= float(log_probs.gather(1, tokens[0, 8:, None]).sum())
    task = Perplexity(PASSAGES, ALIKE, "random")
    full = METHODS["full"].build(setup, METHODS["full"].find(setup, 0.0, ALIKE))
    outcome = task.run(full, "full")
    value = estimate(PERPLEXITY, outcome.items["perplexity"], 0).value
    assert value == pytest.approx(math.exp(nats / 60), rel=1e-4)
    assert outcome.work.tokens == 60
    assert task.settings == {"text": "random", "passages": 3, "prompt_tokens": 8, "new_tokens": 20}


def test_the_full_model_does_not_depart_from_itself(setup: Setup) -> None:
    full = METHODS["full"].build(setup, METHODS["full"].find(setup, 0.0, ALIKE))
    task = FreeGeneration(PASSAGES, ALIKE, full, "random")
    done: list[int] = []
    items = task.run(full, "full", done.append).items
    assert sum(done) == task.total == 6
    assert [item for item, _ in items["KL from full"]] == pytest.approx([0.0] * 3, abs=1e-5)
    assert items["top-1 agreement"] == [(20.0, 20.0)] * 3
    assert items["common prefix"] == [(20.0, 1.0)] * 3


def test_another_method_departs(setup: Setup) -> None:
    full, other = (METHODS[name].build(setup, METHODS[name].find(setup, 0.4, ALIKE)) for name in ("full", "fixed"))
    items = FreeGeneration(PASSAGES, ALIKE, full, "random").run(other, "fixed").items
    written = [
        answer.token_ids
        for answer in full.generate([p.token_ids[:8] for p in PASSAGES], max_new_tokens=20, eos_token_ids=())
    ]
    answers = other.generate([p.token_ids[:8] for p in PASSAGES], max_new_tokens=20, eos_token_ids=())
    forced = [Passage((*p.token_ids[:8], *text), 8) for p, text in zip(PASSAGES, written, strict=True)]
    dense = full.score(forced, keep_log_probs=True)
    for index, reading in enumerate(other.score(forced, reference=dense)):
        assert reading.kl is not None
        assert items["KL from full"][index][0] == pytest.approx(float(reading.kl.sum()), rel=1e-5)
        agree = sum(a == b for a, b in zip(reading.argmax.tolist(), written[index], strict=True))
        assert items["top-1 agreement"][index] == (agree, 20.0)
        same = next((n for n in range(20) if answers[index].token_ids[n] != written[index][n]), 20)
        assert items["common prefix"][index] == (same, 1.0)
        assert same < 20


def test_prefix_and_repetition_by_hand() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([2], [1]) == 0
    assert repeated([1, 2, 3, 4, 1, 2, 3, 4]) == (1.0, 5.0)
    assert repeated([7] * 10) == (6.0, 7.0)
    assert repeated([1, 2, 3]) == (0.0, 0.0)


PAIRS = '{"article": "A long tale.", "summary": "the quick brown fox"}\n{"article": "Another.", "summary": "a dog"}\n'


def test_rouge_by_hand(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(PAIRS)
    task = Summarization(setup.engine, path, ALIKE, max_new_tokens=20)
    method = FakeMethod(["the brown quick fox jumps", "dogs"])
    items = task.run(method, "fake").items
    assert method.prompts[1] == setup.engine.encode("Another.\n\nTL;DR:")
    # 4 of 5 words and 4 of 4; no pair of words; longest common subsequence of 3; "dogs" is "dog" by its stem
    assert [item for item, _ in items["ROUGE-1"]] == pytest.approx([2 * 0.8 * 1 / 1.8, 2 * 1 * 0.5 / 1.5])
    assert [item for item, _ in items["ROUGE-2"]] == [0.0, 0.0]
    assert [item for item, _ in items["ROUGE-L"]] == pytest.approx([2 * 0.6 * 0.75 / 1.35, 2 / 3])
    assert Summarization(setup.engine, path, ALIKE, limit=1, max_new_tokens=20).total == 1


def test_bad_pairs_name_the_line(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(PAIRS + '{"article": "x"}\n')
    with pytest.raises(RequestError, match="line 3: the field 'summary' is missing"):
        Summarization(setup.engine, path, ALIKE)


def test_an_article_that_does_not_fit_is_named(setup: Setup, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(PAIRS + '{"article": "' + "x" * 200 + '", "summary": "x"}\n')
    with pytest.raises(RequestError, match=r"article 3 has 209 tokens .* room for 77 in max_seq_len=96"):
        Summarization(setup.engine, path, ALIKE, max_new_tokens=20)


def test_without_rouge_score_it_says_what_to_install(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(PAIRS)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(SkipkernelsError, match=r"pip install skipkernels\[eval\]"):
        Summarization(setup.engine, path, ALIKE, max_new_tokens=20)


def test_summaries_need_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(PAIRS)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        Summarization(tiny_engine(), path, ALIKE)
