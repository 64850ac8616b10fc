"""Perplexity, free generation and summarisation against figures that are known."""

import math
import sys
from pathlib import Path

import pytest
import torch

from skipkernels.calibration.passages import Passage
from skipkernels.errors import RequestError, SkipkernelsError
from skipkernels.evaluation.agreement import Agreement
from skipkernels.evaluation.estimate import estimate
from skipkernels.evaluation.free_generation import FreeGeneration, common_prefix, repeated
from skipkernels.evaluation.full_text import FullText
from skipkernels.evaluation.perplexity import PERPLEXITY, Perplexity
from skipkernels.evaluation.summarization import Summarization
from skipkernels.methods.method import Method
from skipkernels.methods.methods import METHODS
from skipkernels.methods.setup import Setup
from tests.evaluation.fakes import FakeMethod
from tests.methods.conftest import ALIKE, LAYERS
from tests.models import random_prompt, tiny_engine, tiny_module

PASSAGES = [Passage(tuple(random_prompt(8 + 20, seed)), 8) for seed in range(3)]


def method(setup: Setup, name: str) -> Method:
    return METHODS[name].build(setup, METHODS[name].find(setup, 0.4, ALIKE))


def test_perplexity_is_that_of_transformers(setup: Setup) -> None:
    module = tiny_module(num_hidden_layers=LAYERS)  # the setup's
    nats = 0.0
    with torch.inference_mode():
        for passage in PASSAGES:
            tokens = torch.tensor([passage.token_ids])
            log_probs = module(tokens).logits.log_softmax(-1)[0, 7:-1]
            nats -= float(log_probs.gather(1, tokens[0, 8:, None]).sum())
    task = Perplexity(PASSAGES, ALIKE, "random", method(setup, "full"))
    outcome = task.run(method(setup, "full"), "full")
    value = estimate(PERPLEXITY, outcome.items["perplexity"], 0).value
    assert value == pytest.approx(math.exp(nats / 60), rel=1e-4)
    assert outcome.work.tokens == 60
    assert task.settings == {"text": "random", "passages": 3, "prompt_tokens": 8, "new_tokens": 20}


def test_on_held_out_text_the_distance_from_the_full_model_is_that_of_transformers(setup: Setup) -> None:
    """With the FFNs left out that ``fixed`` chose, past the first decoded token."""
    kind = METHODS["fixed"]
    found = kind.find(setup, 0.4, ALIKE)
    items = Perplexity(PASSAGES, ALIKE, "random", method(setup, "full")).run(kind.build(setup, found), "fixed").items
    module = tiny_module(num_hidden_layers=LAYERS)

    def log_probs(tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return module(tokens).logits.log_softmax(-1)[0, 7:-1]

    tokens = [torch.tensor([passage.token_ids]) for passage in PASSAGES]
    full = [log_probs(each) for each in tokens]
    for layer in found["policy"]["layers"]:
        module.model.layers[layer].mlp.register_forward_hook(_without_after(8))
    for index, (dense, other) in enumerate(zip(full, map(log_probs, tokens), strict=True)):
        kl = (dense.exp() * (dense - other)).sum()
        assert items["KL from full"][index] == (pytest.approx(float(kl), rel=1e-2), 20.0)
        same = (dense.argmax(-1) == other.argmax(-1)).sum()
        assert items["top-1 agreement"][index] == (float(same), 20.0)


def _without_after(prompt_tokens: int):
    def hook(_mlp, _inputs, output: torch.Tensor) -> torch.Tensor:
        output[:, prompt_tokens:] = 0
        return output

    return hook


@pytest.fixture(scope="module")
def texts(setup: Setup) -> tuple[FullText, FullText]:
    full = method(setup, "full")
    return FullText(PASSAGES, full), FullText(ALIKE, full)


def test_the_full_models_text_is_what_it_writes(setup: Setup, texts: tuple[FullText, FullText]) -> None:
    for given, passage in zip(PASSAGES, texts[0].passages, strict=True):
        (generation,) = setup.engine.generate([given.token_ids[:8]], max_new_tokens=20, eos_token_ids=())
        assert passage == Passage((*given.token_ids[:8], *generation.token_ids), 8)
    assert texts[0].passages is texts[0].passages  # written once


def test_the_full_model_agrees_with_itself(setup: Setup, texts: tuple[FullText, FullText]) -> None:
    full, done = method(setup, "full"), []
    items = Agreement(*texts).run(full, "full", done.append).items
    assert [item for item, _ in items["KL from full"]] == pytest.approx([0.0] * 3, abs=1e-5)
    assert items["top-1 agreement"] == [(20.0, 20.0)] * 3
    assert FreeGeneration(*texts).run(full, "full", done.append).items["common prefix"] == [(20.0, 1.0)] * 3
    assert sum(done) == Agreement(*texts).total + FreeGeneration(*texts).total == 6


def test_another_method_departs(setup: Setup, texts: tuple[FullText, FullText]) -> None:
    other, dense = method(setup, "fixed"), texts[0].readings
    agreement, free = (task.run(other, "fixed") for task in (Agreement(*texts), FreeGeneration(*texts)))
    answers = other.generate(texts[0].prompts, max_new_tokens=20, eos_token_ids=())
    for index, reading in enumerate(other.score(texts[0].passages, reference=dense)):
        assert reading.kl is not None
        written = texts[0].passages[index].token_ids[8:]
        assert agreement.items["KL from full"][index] == (pytest.approx(float(reading.kl.sum()), rel=1e-5), 20.0)
        agree = sum(a == b for a, b in zip(reading.argmax.tolist(), written, strict=True))
        assert agreement.items["top-1 agreement"][index] == (agree, 20.0)
        same = next((n for n in range(20) if answers[index].token_ids[n] != written[n]), 20)
        assert free.items["common prefix"][index] == (same, 1.0)
        assert same < 20
    assert agreement.work.tokens == free.work.tokens == 60


def test_what_sets_the_ratio_is_other_text_of_the_full_model(texts: tuple[FullText, FullText]) -> None:
    for task in (Agreement(*texts), FreeGeneration(*texts)):
        assert task.alike == texts[1].passages
        assert not {p.token_ids[:8] for p in task.alike} & {p.token_ids[:8] for p in texts[0].passages}
        assert task.settings == {"prompts": 3, "new_tokens": 20}


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
    writer = FakeMethod(["the brown quick fox jumps", "dogs"])
    items = task.run(writer, "fake").items
    assert writer.prompts[1] == setup.engine.encode("Another.\n\nTL;DR:")
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
