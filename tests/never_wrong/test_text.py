"""Streamed text, ``text`` and the tokenizer agree at every prefix that ends on a character."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from skipkernels.model.text import TextStream
from tests.models import EOS, stock_tokens, tiny_engine, tiny_module
from tests.never_wrong.tokenizers import KINDS, WORDS, byte_fallback_tokenizer, byte_ids

TOKENIZERS = {kind: make() for kind, make in KINDS.items()}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def token_lists(tokenizer: PreTrainedTokenizerBase) -> st.SearchStrategy[list[int]]:
    """Any ids, among them runs of whole characters in bytes."""
    anything = st.lists(st.integers(0, len(tokenizer) - 1), max_size=6)
    first = tokenizer.convert_tokens_to_ids("<0x00>") if "<0x00>" in tokenizer.get_vocab() else 0
    size = len(tokenizer)
    characters = st.text("aé日🦉 ", max_size=12).map(
        lambda text: [first + byte for byte in text.encode() if first + byte < size]
    )
    return st.lists(st.one_of(anything, characters), max_size=12).map(lambda parts: [i for part in parts for i in part])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_prefix_that_ends_on_a_character(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(token_lists(tokenizer))
    stream, given_out = TextStream(tokenizer), ""
    for count, token in enumerate(ids, 1):
        given_out += stream.push(token)
        whole = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if REPLACEMENT not in whole:
            assert given_out == stream.text == whole
    given_out += stream.flush()
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert stream.text == whole
    if REPLACEMENT not in whole:
        assert given_out == whole


@pytest.mark.parametrize("text", ["日本語テスト", "日本語テスト" * 40, "naïve 🦉🦉", "a日b本c"])
def test_runs_of_bytes_come_out_as_they_went_in(text: str) -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in byte_ids(text)]
    assert [piece for piece in pieces if piece] == list(text)  # each as soon as it is whole
    assert "".join(pieces) + stream.flush() == stream.text == text


def test_a_stop_string_inside_of_a_run_of_bytes_stops_there() -> None:
    stream = TextStream(TOKENIZERS["byte fallback"], ["語テ"])
    for token in byte_ids("日本語テスト"):
        stream.push(token)
        if stream.stopped:
            break
    assert (stream.text, stream.num_tokens) == ("日本", 12)


def test_a_space_behind_special_tokens_is_kept() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = [3 + WORDS.index("a"), *[2] * 40, 3 + WORDS.index("▁a")]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) == tokenizer.decode(ids, skip_special_tokens=True) == "a a"


@pytest.mark.parametrize(
    ("stop", "text"), [(["</s>"], "ab"), (["b</s>"], "a"), (["</s>c"], "ab"), (["x"], "abcd"), (["</s>x"], "abcd")]
)
def test_a_stop_string_may_name_a_special_token(stop: list[str], text: str) -> None:
    tokenizer = TOKENIZERS["byte level"]
    stream, pieces = TextStream(tokenizer, stop), []
    for token in (*b"ab", 257, *b"cd"):
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    assert "".join(pieces) + stream.flush() == stream.text == text
    assert stream.stopped == (text != "abcd")


def test_the_engines_text_is_the_tokenizers() -> None:
    """A random model's tokens: bytes without sense, words and special tokens."""
    tokenizer = byte_fallback_tokenizer()
    engine = tiny_engine(tokenizer=tokenizer)
    for seed in range(4):
        (answer,) = engine.generate([seed + 1, 7], max_new_tokens=40, eos_token_ids=[])
        ids = [token for token in answer.token_ids if token < len(tokenizer)]
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_special_stop_string_ends_generate_and_stream() -> None:
    module = tiny_module()
    spoken = stock_tokens(module, [1, 2, 3], 4)[3]
    with torch.no_grad():  # </s> wins wherever that token would
        module.lm_head.weight[EOS] = 3 * module.lm_head.weight[spoken]
    engine = tiny_engine(module=module, tokenizer=TOKENIZERS["byte level"])
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_ids": []}
    (free,) = engine.generate([1, 2, 3], **options)
    (answer,) = engine.generate([1, 2, 3], stop=["</s>"], **options)
    chunks = list(engine.stream([1, 2, 3], stop=["</s>"], **options))
    assert len(free.token_ids) == 12
    assert answer.token_ids == free.token_ids[: free.token_ids.index(EOS) + 1]
    assert answer.finish_reason == "stop"
    assert "".join(chunk.text for chunk in chunks) == answer.text
