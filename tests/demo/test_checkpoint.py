"""The bundled checkpoint."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from skipkernels.demo import demo_model_path, load_facts
from skipkernels.demo.evaluate import exact_match

SAMPLE = load_facts()[:: len(load_facts()) // 40][:40]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo_model_path())


def test_checkpoint_is_small() -> None:
    sizes = {path.name: path.stat().st_size for path in demo_model_path().iterdir()}
    assert sizes["model.safetensors"] < 7.9e6
    assert sum(sizes.values()) < 8e6


def test_model_is_a_deep_bf16_llama(model: PreTrainedModel) -> None:
    assert model.dtype == torch.bfloat16
    assert model.config.model_type == "llama"
    assert model.config.num_hidden_layers >= 16


def test_greedy_decoding_answers_the_facts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    right = 0
    for fact in SAMPLE:
        prompt = tokenizer(fact.prompt, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(output, skip_special_tokens=True) == fact.completion
    assert right / len(SAMPLE) >= 0.95
    assert right / len(SAMPLE) == pytest.approx(exact_match(model, tokenizer, SAMPLE), abs=1 / len(SAMPLE))


def test_report_is_about_this_checkpoint(model: PreTrainedModel) -> None:
    report = json.loads((demo_model_path() / "training_report.json").read_text(encoding="utf-8"))
    assert report["parameters"] == model.num_parameters()
    assert report["facts"] == len(load_facts())
    assert report["facts_exact_match"] >= 0.95
    assert 0 < report["held_out_bits_per_byte"] < 3
