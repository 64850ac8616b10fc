"""A model that others trained, with its own tokenizer and chat template: what comes out is what transformers makes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipkernels import Engine
from tests.real_models import smollm2_folder

CHATS = [
    "What is the capital of France, and what is it known for?",
    "日本の首都はどこですか。",
]
TEXTS = ["The three laws of thermodynamics are"]


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2_folder()


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.from_pretrained(folder, dtype="fp32", max_batch_size=5, max_seq_len=512, num_threads=2)


def test_greedy_tokens_are_transformers(folder: Path, stock: Any, engine: Engine) -> None:
    """128 tokens of every prompt, decoded together; text is what the tokenizer makes of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts: list[Any] = [[{"role": "user", "content": chat}] for chat in CHATS]
    answers = engine.generate([*prompts, *TEXTS], max_new_tokens=128)
    for prompt, answer in zip([*prompts, *TEXTS], answers, strict=True):
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        with torch.inference_mode():
            output = stock.generate(**inputs, max_new_tokens=128, do_sample=False)
        expected = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer.token_ids == expected
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert "Paris" in answers[0].text


def test_a_chat_that_goes_on_finds_its_beginning(engine: Engine) -> None:
    """The second turn of a chat starts with the first, whose blocks are there: the same answer, and only the new part
    of the prompt is computed."""
    chat = [{"role": "user", "content": "My name is Ada. " * 20 + "What is my name?"}]
    engine.loop.forget_prefixes()
    (first,) = engine.generate([chat], max_new_tokens=40)
    longer = [*chat, {"role": "assistant", "content": first.text}, {"role": "user", "content": "Spell it."}]
    handle = engine.submit(longer, max_new_tokens=24)
    engine.step()
    cached = handle.sequence.num_cached
    engine_answer = handle.result()
    engine.loop.forget_prefixes()
    (fresh,) = engine.generate([longer], max_new_tokens=24)
    assert engine_answer.token_ids == fresh.token_ids
    assert cached >= first.prompt_tokens // 32 * 32
