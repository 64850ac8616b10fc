"""Gemma 3 270M, a base model that others trained, from its GGUF file in Q4_K_M: decoded as transformers decodes it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipkernels import Engine
from tests.real_models import gemma3_gguf

PROMPTS = ["The capital of France is", "In 2024, the three largest rivers of  Europe were", "def fibonacci(n):\n"]


@pytest.fixture(scope="module")
def path() -> Path:
    return gemma3_gguf()


def test_greedy_tokens_are_transformers_on_the_dequantised_file(path: Path) -> None:
    """Also the tokens of the prompts, of which each begins with one of the beginning, and the length beyond which the
    sliding layers forget."""
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    stock: Any = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    engine = Engine.from_pretrained(
        path, dtype="fp32", max_batch_size=3, max_seq_len=1024, num_threads=2, tokenizer=tokenizer
    )
    text = "The river rises in the hills and flows past the old town to the sea. " * 40
    prompts = [*PROMPTS[:2], text]
    answers = engine.generate(prompts, max_new_tokens=128, eos_token_ids=[1])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert ids[0, 0] == tokenizer.bos_token_id
        with torch.inference_mode():
            output = stock.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, do_sample=False, eos_token_id=[1]
            )
        assert answer.token_ids == output[0, ids.shape[1] :].tolist()
    assert ids.shape[1] > 512
    assert "largest city in France" in answers[0].text


def test_the_file_s_own_formats_answer(path: Path) -> None:
    engine = Engine.from_pretrained(path, max_batch_size=2, max_seq_len=256, num_threads=2)
    assert set(engine.dtype.split("+")) == {"q4_k", "q5_0", "q6_k", "q8_0"}
    assert engine.default_eos_token_ids == (1, 106)
    answers = engine.generate([PROMPTS[0], PROMPTS[2]], max_new_tokens=48)
    assert "capital of the country of France" in answers[0].text
    assert "return" in answers[1].text
