"""Text out of tokens: whole characters, stop strings across tokens."""

from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.model.text import TextStream
from tests.models import EOS


def feed(stream: TextStream, text: str | bytes) -> list[str]:
    """Pushes one token for each byte until the stream stops; returns what each push gave."""
    pieces = []
    for byte in text.encode() if isinstance(text, str) else text:
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    return pieces


@pytest.mark.parametrize("text", ["plain", "naïve café ✓", "🦉𝔘🦉", "  two  spaces\n\ttab \r\n", "a , b . c ' s"])
def test_pieces_are_whole_characters_and_make_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    stream = TextStream(tokenizer)
    pieces = feed(stream, text)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) == len(text)
    assert "".join(pieces) + stream.flush() == stream.text == text


def test_long_texts_are_not_decoded_again_and_again(tokenizer: PreTrainedTokenizerBase, monkeypatch) -> None:
    longest = 0
    decode = type(tokenizer).decode

    def watched(self: PreTrainedTokenizerBase, ids: Sequence[int], **options: bool) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", watched)
    stream, text = TextStream(tokenizer), "ü🦉x" * 100
    assert "".join(feed(stream, text)) == text
    assert longest < 20


def test_an_incomplete_character_is_held_back_and_given_up_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer)
    assert feed(stream, "ok🦉".encode()[:-1]) == ["o", "k", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.text == "ok\ufffd"


def test_bytes_that_are_no_text_do_not_block_what_follows(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer)
    assert "".join(feed(stream, b"a\xff\xfeb")) == "a\ufffd\ufffdb"


def test_special_tokens_are_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in (ord("a"), EOS, ord("b"))] == ["a", "", "b"]


@pytest.mark.parametrize(
    ("text", "stop", "expected", "tokens"),
    [
        ("one\n\ntwo", ["\n\n"], "one", 5),
        ("one END two", ["END"], "one ", 7),
        ("abcabd!", ["abd"], "abc", 6),  # the first try to match fails halfway
        ("aaab", ["aab"], "a", 4),
        ("x🦉y", ["🦉"], "x", 5),
        ("x🦉y", ["🦉y"], "x", 6),
        ("one two", ["two", "ne"], "o", 3),
        ("one two", ["o", "one"], "", 1),
        ("nothing", ["absent"], "nothing", 7),
        ("stop", ["stop"], "", 4),
    ],
)
def test_a_stop_string_ends_the_text(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str], expected: str, tokens: int
) -> None:
    stream = TextStream(tokenizer, stop)
    pieces = feed(stream, text)
    assert stream.stopped == (stop != ["absent"])
    assert stream.num_tokens == tokens
    assert "".join(pieces) + stream.flush() == stream.text == expected


def test_what_may_become_a_stop_string_is_held_back(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, ["END"])
    assert feed(stream, "aENb") == ["a", "", "", "ENb"]
    assert feed(stream, "EN") == ["", ""]
    assert stream.flush() == "EN"


def test_nothing_follows_a_stop_string(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, ["x"])
    assert feed(stream, "ax") == ["a", ""]
    assert stream.flush() == ""
    assert stream.text == "a"
