"""Chats become token ids; what a text model cannot answer is refused before it waits."""

import pickle

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.chat.chat import Chat, Message, Role
from skipkernels.chat.text_format import TextFormat, TextPrompt, work_of
from skipkernels.decoding.generation import SamplingParams
from skipkernels.errors import RequestError
from tests.models import BOS, byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' and loop.first %}"
    "{{ raise_exception('nobody has asked') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def chat(*turns: tuple[Role, str], **fields: object) -> Chat:
    return Chat(tuple(Message(role, (text,)) for role, text in turns), **fields)  # type: ignore[arg-type]


def prompt(text_format: TextFormat, asked: Chat) -> TextPrompt:
    return text_format.request(asked).inputs["text"]


@pytest.fixture
def plain(tokenizer: PreTrainedTokenizerBase) -> TextFormat:
    return TextFormat(tokenizer, max_seq_len=40, prefill_share=0.25)


@pytest.fixture
def templated() -> TextFormat:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return TextFormat(tokenizer, max_seq_len=40, prefill_share=0.25)


def test_without_a_template_one_message_is_the_prompt(plain: TextFormat) -> None:
    sampling = SamplingParams(temperature=0.5, seed=3)
    asked = chat(("user", "Hello"), max_new_tokens=7, sampling=sampling, stop=("x",))
    assert prompt(plain, asked) == TextPrompt((BOS, *b"Hello"), 7, sampling, ("x",))


def test_parts_of_a_message_are_one_text(plain: TextFormat) -> None:
    asked = Chat((Message("user", ("Hel", "lo")),))
    assert prompt(plain, asked).token_ids == (BOS, *b"Hello")


def test_a_template_takes_every_turn(templated: TextFormat) -> None:
    asked = chat(("system", "S"), ("user", "a"), ("assistant", ""), ("user", "b"))
    assert bytes(prompt(templated, asked).token_ids) == b"<system>S<user>a<assistant><user>b>"


@pytest.mark.parametrize(
    "turns", [[("system", "S"), ("user", "a")], [("assistant", "a")], [("user", "a"), ("user", "b")]]
)
def test_without_a_template_other_messages_are_refused(plain: TextFormat, turns: list[tuple[Role, str]]) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        plain.request(chat(*turns))


def test_what_a_template_refuses_is_the_callers_mistake(templated: TextFormat) -> None:
    with pytest.raises(RequestError, match="nobody has asked"):
        templated.request(chat(("assistant", "a")))


def test_messages_without_text_are_refused(plain: TextFormat) -> None:
    with pytest.raises(RequestError, match="hold no text"):
        plain.request(chat(("user", "")))


def test_room_for_the_answer(plain: TextFormat) -> None:
    """40 positions: the last token is not cached."""
    assert prompt(plain, chat(("user", "x" * 29))).max_new_tokens == 11
    assert prompt(plain, chat(("user", "x" * 39))).max_new_tokens == 1
    assert prompt(plain, chat(("user", "x" * 29), max_new_tokens=11)).max_new_tokens == 11
    assert prompt(plain, chat(("user", "x" * 29), max_new_tokens=12)).max_new_tokens == 11  # clipped
    with pytest.raises(RequestError, match="the prompt has 41 tokens, this model takes 40"):
        plain.request(chat(("user", "x" * 40)))


def test_a_text_that_no_tokens_can_make_up_is_not_even_encoded(plain: TextFormat) -> None:
    with pytest.raises(RequestError, match="has 30,000,000 characters; this model takes 40 tokens"):
        plain.request(chat(("user", "x" * 30_000_000)))


def test_work_counts_new_tokens_and_a_share_of_the_prompt(plain: TextFormat) -> None:
    work = plain.request(chat(("user", "x" * 15), max_new_tokens=20)).work
    assert work == (20 + 0.25 * 16) / (64 + 0.25 * 32)
    assert work_of(32, 64, 0.25) == 1.0


def test_a_format_travels_to_other_processes(templated: TextFormat) -> None:
    asked = chat(("user", "Hello"))
    assert pickle.loads(pickle.dumps(templated)).request(asked).inputs == templated.request(asked).inputs
