"""The tokenizer of the demo model."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from skipkernels.demo.batches import fact_tokens
from skipkernels.demo.facts import Fact
from skipkernels.demo.tokenizer import train_tokenizer

TEXTS = [
    "Return the value of the key, or the default.",
    "naïve café ✓",
    "  indented\n\n\ttabs \r\n end ",
    "a , b . c ' s",
    "🦉 𝔘",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS[:1] * 10, vocab_size=300, max_length=64)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_back_every_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_encoding_starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer("text")["input_ids"][0] == tokenizer.bos_token_id


def test_a_saved_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerBase, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [loaded(text)["input_ids"] for text in TEXTS] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize("answer", ["404", "(", "_x", "é", "a += b", "'"])
def test_prompt_and_completion_split_between_tokens(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    fact = Fact("What is it?", answer, "topic")
    prompt, completion = fact_tokens(tokenizer, fact)
    assert prompt + completion == [*tokenizer(fact.text)["input_ids"], tokenizer.eos_token_id]
