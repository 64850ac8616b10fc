"""A GGUF file that others made, with its tokenizer and chat template: decoded as transformers decodes its weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipkernels import Engine
from tests.real_models import smollm2_folder, smollm2_gguf

CHATS = ["What is the capital of France, and what is it known for?", "日本の首都はどこですか。"]
PROMPTS: list[Any] = [[{"role": "user", "content": chat}] for chat in CHATS] + ["The three laws of thermodynamics are"]


@pytest.fixture(scope="module")
def path() -> Path:
    return smollm2_gguf()


@pytest.fixture(scope="module")
def stock() -> Any:
    """transformers' module with its own reading of the file."""
    return AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32)


@pytest.fixture(scope="module")
def dequantised(path: Path) -> Engine:
    return Engine.from_pretrained(path, dtype="fp32", max_batch_size=3, max_seq_len=512, num_threads=2)


def test_greedy_tokens_are_transformers(stock: Any, dequantised: Engine) -> None:
    answers = dequantised.generate(PROMPTS, max_new_tokens=128)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([dequantised.encode(prompt)])
        with torch.inference_mode():
            output = stock.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False, eos_token_id=[2, 0]
            )
        assert answer.token_ids == output[0, ids.shape[1] :].tolist()
    assert "Paris" in answers[0].text
    assert dequantised.default_eos_token_ids == (2, 0)


def test_the_file_s_own_formats_answer(path: Path) -> None:
    engine = Engine.from_pretrained(path, max_seq_len=512, num_threads=2)
    assert {part.format for part in engine.weights.layers[0].qkv_proj.parts} == {"q4_1"}  # type: ignore[union-attr]
    assert engine.weights.nbytes() < 1.1 * path.stat().st_size
    (answer,) = engine.generate([PROMPTS[0]], max_new_tokens=64)
    assert "Paris" in answer.text


def test_bytes_are_those_of_the_formats(path: Path, dequantised: Engine) -> None:
    engine = Engine.from_pretrained(path, max_seq_len=64)
    weights, config = engine.weights, dequantised.config
    assert (engine.dtype, dequantised.dtype) == ("q4_1+q8_0", "fp32")
    assert dequantised.weights.decode_nbytes() == config.decode_weight_bytes(torch.float32)
    assert dequantised.weights.ffn_nbytes() == config.ffn_bytes(torch.float32)
    # Q4_1 is 5 bits a weight; the file holds some matrices in wider formats
    assert 5 / 32 <= weights.decode_nbytes() / config.decode_weight_bytes(torch.float32) < 8.5 / 32
    assert 5 / 32 <= weights.ffn_nbytes() / config.ffn_bytes(torch.float32) < 8.5 / 32


def test_chat_template_and_special_tokens(path: Path, dequantised: Engine) -> None:
    stock = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for prompt in PROMPTS[:2]:
        expected = stock.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        assert expected.startswith("<|im_start|>system")
        tokens = dequantised.encode(prompt)
        assert dequantised.tokenizer.decode(tokens) == expected  # type: ignore[union-attr]
        assert tokens == stock(expected, add_special_tokens=False)["input_ids"]


def test_digits_are_tokens_of_their_own(dequantised: Engine) -> None:
    """The model was trained so; transformers' reading of the file takes GPT-2's split."""
    tokens = dequantised.encode("In 2024, 365 days")
    texts = [dequantised.tokenizer.decode([token]) for token in tokens]  # type: ignore[union-attr]
    assert texts == ["In", " ", "2", "0", "2", "4", ",", " ", "3", "6", "5", " days"]
