"""lm-evaluation-harness on a method: its requests by hand against transformers, and a local task from end to end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipkernels.errors import RequestError
from skipkernels.methods.methods import METHODS
from skipkernels.methods.setup import Setup
from skipkernels.methods.short_gpt import ShortGPT
from tests.models import BOS, EOS, byte_tokenizer, random_prompt, tiny_engine, tiny_module

pytest.importorskip("lm_eval")

from lm_eval.api import metrics
from lm_eval.api.instance import Instance

from skipkernels.evaluation import harness
from skipkernels.evaluation.estimate import Metric, estimate
from skipkernels.evaluation.harness import HarnessTask
from skipkernels.integrations.lm_eval import MethodLM

LAYERS = 6
MODULE = tiny_module(num_hidden_layers=LAYERS)
PAIRS = [("the quick brown", " fox"), ("x", "y"), ("", "alone"), ("trailing  ", "spaces")]


@pytest.fixture(scope="module")
def setup() -> Setup:
    engine = tiny_engine(
        module=tiny_module(num_hidden_layers=LAYERS), tokenizer=byte_tokenizer(), max_batch_size=4, max_seq_len=160
    )
    return Setup(engine, [random_prompt(2000)], prompt_tokens=8, new_tokens=20, passages=4)


def lm_of(setup: Setup, name: str, **options: int) -> MethodLM:
    """A method that needs no search."""
    found = (
        {"removed": [2]} if name == "shortgpt" else {"policy": {"kind": "fixed", "layers": [1, 2], "warmup_tokens": 1}}
    )
    if name == "full":
        found = METHODS[name].find(setup, 0.0, [])
    return MethodLM(setup.engine, METHODS[name].build(setup, found), **options)


def requests(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


def expected_log_likelihood(context: str, continuation: str) -> tuple[float, bool]:
    """By transformers, on bytes with <s> in front."""
    whole = torch.tensor([[BOS, *(context + continuation).encode()]])
    count = len((context + continuation).encode()) - len(context.rstrip().encode() if context.strip() else b"")
    with torch.inference_mode():
        log_probs = MODULE(whole).logits[0, :-1].log_softmax(-1)[-count:]
    own = whole[0, -count:]
    return float(log_probs.gather(1, own[:, None]).sum()), bool((log_probs.argmax(-1) == own).all())


@pytest.mark.parametrize("decoded_context", [None, 0, 3])
def test_log_likelihoods_of_the_full_model_are_those_of_transformers(setup: Setup, decoded_context: int | None) -> None:
    lm = MethodLM(setup.engine, lm_of(setup, "full")._method, decoded_context=decoded_context)
    results = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, results, strict=True):
        expected, expected_greedy = expected_log_likelihood(context, continuation)
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy


def test_what_greedy_decoding_would_say_is_greedy(setup: Setup) -> None:
    lm = lm_of(setup, "fixed", decoded_context=0)
    prompt = "some context"
    (text,) = lm.generate_until(requests("generate_until", (prompt, {"until": [], "max_gen_toks": 6})))
    if not text.isascii():
        text = text.encode()[: text.encode().find(b"\xef")].decode()
    assert text
    ((_, greedy),) = lm.loglikelihood(requests("loglikelihood", (prompt, text)), disable_tqdm=True)
    assert greedy


def test_the_policy_is_active_in_scoring_even_of_one_token(setup: Setup) -> None:
    full, skipping = lm_of(setup, "full"), lm_of(setup, "fixed")
    pair = requests("loglikelihood", ("a context of some length", "y"))
    ((value, _),), ((other, _),) = (lm.loglikelihood(pair, disable_tqdm=True) for lm in (full, skipping))
    assert abs(value - other) > 1e-3
    # all but the first of 25 context tokens and the prompt's own step skip two of six layers
    assert skipping.work.ffns_skipped == 2 * (skipping.work.tokens - 1)
    assert skipping.work.tokens == 24 + 1
    prefilled = lm_of(setup, "fixed", decoded_context=0)
    ((same, _),) = prefilled.loglikelihood(pair, disable_tqdm=True)
    assert same == pytest.approx(value, abs=1e-4)
    assert prefilled.work.ffns_skipped == 0


def test_generation_is_the_methods_and_ends_where_the_task_says(setup: Setup) -> None:
    lm = lm_of(setup, "shortgpt")
    method = ShortGPT().build(setup, {"removed": [2]})
    prompts = ["one", "two two", "three"]
    options = [
        {"until": ["\x00"], "max_gen_toks": 9},
        {"until": [], "max_gen_toks": 5},
        {"until": ["\x00"], "max_gen_toks": 9},
    ]
    texts = lm.generate_until(requests("generate_until", *zip(prompts, options, strict=True)))
    for prompt, given, text in zip(prompts, options, texts, strict=True):
        (answer,) = method.generate(
            [setup.engine.encode(prompt)], max_new_tokens=given["max_gen_toks"], stop=given["until"]
        )
        assert text == answer.text
    (stopped,) = lm.generate_until(requests("generate_until", ("two two", {"until": [texts[1][2]], "max_gen_toks": 5})))
    assert stopped == texts[1][: texts[1].index(texts[1][2])]


def test_sampling_is_refused(setup: Setup) -> None:
    with pytest.raises(RequestError, match="wants to sample"):
        lm_of(setup, "full").generate_until(
            requests("generate_until", ("a", {"until": [], "do_sample": True, "temperature": 0.7}))
        )


def test_a_long_text_is_read_in_windows(setup: Setup) -> None:
    text = "".join(chr(97 + token % 26) for token in random_prompt(250))
    (value,) = lm_of(setup, "full").loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    expected, size = 0.0, setup.engine.max_seq_len
    tokens = torch.tensor([BOS, *text.encode()])
    with torch.inference_mode():
        head = MODULE(tokens[None, :size]).logits[0].log_softmax(-1)
        expected += float(head.gather(1, tokens[1 : size + 1, None]).sum())
        tail = MODULE(tokens[None, len(tokens) - 1 - size : -1]).logits[0].log_softmax(-1)
        rest = tokens[size + 1 :]
        expected += float(tail[-len(rest) :].gather(1, rest[:, None]).sum())
    assert value == pytest.approx(expected, abs=1e-2)


def test_a_context_that_does_not_fit_loses_its_beginning(setup: Setup) -> None:
    context = "".join(chr(97 + token % 26) for token in random_prompt(300))
    ((value, _),) = lm_of(setup, "full").loglikelihood(requests("loglikelihood", (context, " end")), disable_tqdm=True)
    tokens = torch.tensor([*context.encode(), *b" end"])[-(setup.engine.max_seq_len + 1) :]
    with torch.inference_mode():
        log_probs = MODULE(tokens[None, :-1]).logits[0, -4:].log_softmax(-1)
    assert value == pytest.approx(float(log_probs.gather(1, tokens[-4:, None]).sum()), abs=1e-3)
    with pytest.raises(RequestError, match="continuation of 200 tokens does not fit max_seq_len=160"):
        lm_of(setup, "full").loglikelihood(requests("loglikelihood", ("a", "b" * 200)), disable_tqdm=True)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A multiple choice, a generation and a text to read, on files of their own."""
    rows = [{"question": f"Is {n} even?", "answer": n % 2, "text": f"line {n} of the text"} for n in range(5)]
    data = tmp_path / "data.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        f"task: local_choice\n{source}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: answer\ndoc_to_choice: ["yes", "no"]\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 2.0\n"
    )
    (tmp_path / "write.yaml").write_text(
        f"task: local_write\n{source}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{text}}"\n'
        "generation_kwargs:\n  until: []\n  max_gen_toks: 7\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (tmp_path / "read.yaml").write_text(
        f"task: local_read\n{source}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n"
    )
    return tmp_path


def test_a_choice_is_that_of_the_higher_log_likelihood(setup: Setup, tasks: Path) -> None:
    task = HarnessTask(setup.engine, "local_choice", [], include=tasks)
    assert (task.name, [metric.name for metric in task.metrics]) == ("lm-eval:local_choice", ["acc"])
    assert task.settings == {"version": 2.0, "limit": None, "decoded_context": None}
    done: list[int] = []
    outcome = task.run(lm_of(setup, "full")._method, "full", done.append)
    right = []
    for number in range(5):
        yes, no = (expected_log_likelihood(f"Is {number} even?", f" {word}")[0] for word in ("yes", "no"))
        right.append(float((no > yes) == (number % 2 == 1)))
    assert outcome.items == {"acc": [(value, 1.0) for value in right]}
    assert done == [1]
    skipping = task.run(lm_of(setup, "fixed")._method, "fixed")
    assert skipping.work.ffn_skip_ratio > 0.3
    assert HarnessTask(setup.engine, "local_choice", [], include=tasks, limit=2).run(
        lm_of(setup, "full")._method, "full"
    ).items == {"acc": outcome.items["acc"][:2]}


def test_generation_tasks_decode_with_the_method(setup: Setup, tasks: Path) -> None:
    outcome = HarnessTask(setup.engine, "local_write", [], include=tasks).run(lm_of(setup, "fixed")._method, "fixed")
    assert len(outcome.items["exact_match"]) == 5
    assert outcome.work.tokens == 5 * 7
    assert outcome.work.ffns_skipped == 5 * 6 * 2


def test_perplexities_are_summed_up_as_the_harness_does(setup: Setup, tasks: Path) -> None:
    task = HarnessTask(setup.engine, "local_read", [], include=tasks)
    assert [(metric.name, metric.exponential, metric.higher_is_better) for metric in task.metrics] == [
        ("word_perplexity", True, False),
        ("bits_per_byte", False, False),
    ]
    items = task.run(lm_of(setup, "full")._method, "full").items
    for number in range(5):
        expected, _ = expected_log_likelihood("", f"line {number} of the text")
        assert items["word_perplexity"][number] == pytest.approx((-expected, 5.0), rel=1e-3)
        assert items["bits_per_byte"][number] == pytest.approx((-expected / 0.693147, 18.0), rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("mean", [1.0, 0.0, 1.0]),
        ("perplexity", [-1.0, -2.5, -0.5]),
        ("weighted_perplexity", [(-10.0, 4), (-3.0, 2)]),
        ("bits_per_byte", [(-10.0, 8), (-3.0, 9)]),
    ],
)
def test_every_way_to_sum_up_is_the_harnesss(kind: str, values: list[Any]) -> None:
    metric = Metric(kind, harness._UNITS[kind], higher_is_better=True, exponential=harness._UNITS[kind] == "perplexity")
    items = [harness._item(kind, value) for value in values]
    assert estimate(metric, items, 0).value == pytest.approx(getattr(metrics, kind)(values))


@pytest.mark.slow  # reads the index of all the harness's tasks
def test_an_unknown_task_and_a_group_are_refused(setup: Setup, tasks: Path) -> None:
    with pytest.raises(RequestError, match=r"has no task 'local_choice'; --lm-eval-include names a folder"):
        HarnessTask(setup.engine, "local_choice", [])
    with pytest.raises(RequestError, match="has no task 'none', nor has"):
        HarnessTask(setup.engine, "none", [], include=tasks)
    with pytest.raises(RequestError, match="'mmlu' is a group"):
        HarnessTask(setup.engine, "mmlu", [])


def test_special_tokens_are_not_doubled(setup: Setup) -> None:
    lm = lm_of(setup, "full")
    assert lm.tok_encode("a") == [BOS, 97]
    assert lm.tok_encode("<s>a") == [BOS, 97]
    assert lm.tok_encode("a", add_special_tokens=False) == [97]
    assert (lm.prefix_token_id, lm.eot_token_id) == (BOS, EOS)


def test_what_the_harness_cannot_do_without(setup: Setup) -> None:
    method = lm_of(setup, "full")._method
    with pytest.raises(RequestError, match="needs a tokenizer"):
        MethodLM(tiny_engine(), method)
    with pytest.raises(RequestError, match="must not be negative, got -1"):
        MethodLM(setup.engine, method, decoded_context=-1)
    with pytest.raises(RequestError, match="no chat template"):
        MethodLM(setup.engine, method).apply_chat_template([{"role": "user", "content": "x"}])
