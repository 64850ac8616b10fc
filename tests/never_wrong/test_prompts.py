"""Every container of text, token ids and messages: what is meant is done, the rest is a TypeError that says so."""

import array
import collections
import io
import logging
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, PreTrainedTokenizerBase

from skipkernels import SamplingParams, SkipkernelsError
from skipkernels.engine import Engine
from skipkernels.errors import PolicyError, RequestError
from tests.models import BOS, byte_tokenizer, tiny_engine, tiny_module

IDS, OTHER = [5, 6, 7], [8, 9]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
MESSAGE = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    made.pad_token = "</s>"
    return made


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    return tiny_engine(tokenizer=tokenizer, max_batch_size=4)


def tokens(engine: Engine, prompts: Any) -> list[list[int]]:
    return [answer.token_ids for answer in engine.generate(prompts, max_new_tokens=5, eos_token_ids=[])]


ONE_PROMPT: dict[str, Any] = {
    "tuple": (5, 6, 7),
    "generator": lambda: (token for token in IDS),
    "range": range(5, 8),
    "list of numpy ints": [np.int64(5), np.int32(6), np.uint8(7)],
    "list of tensors": [torch.tensor(token) for token in IDS],
    "numpy": np.array(IDS),
    "numpy uint16": np.array(IDS, dtype=np.uint16),
    "numpy objects": np.array(IDS, dtype=object),
    "numpy two dimensions": np.array([IDS]),
    "torch": torch.tensor(IDS),
    "torch int32": torch.tensor(IDS, dtype=torch.int32),
    "torch two dimensions": torch.tensor([IDS]),
    "array": array.array("i", IDS),
    "deque": collections.deque(IDS),
    "map": lambda: map(int, "567"),
    "dict": {"input_ids": IDS},
    "dict with a mask": {"input_ids": IDS, "attention_mask": [1, 1, 1]},
    "dict of tensors": {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 3, dtype=torch.bool)},
    "padded on the left": {"input_ids": [0, *IDS], "attention_mask": [0, 1, 1, 1]},
    "padded on the right": {"input_ids": [[*IDS, 0, 0]], "attention_mask": np.array([[1, 1, 1, 0, 0]])},
    "BatchEncoding": BatchEncoding({"input_ids": IDS, "token_type_ids": [0, 0, 0]}),
    "mapping": types.MappingProxyType({"input_ids": IDS}),
    "list of one list": [IDS],
    "list of one dict": [{"input_ids": IDS}],
}


@pytest.mark.parametrize("name", ONE_PROMPT)
def test_one_prompt_in_any_container(engine: Engine, name: str) -> None:
    made = ONE_PROMPT[name]
    expected = tokens(engine, [IDS])
    assert tokens(engine, made() if callable(made) else made) == expected
    assert engine.encode(made() if callable(made) else made) == IDS
    chunks = engine.stream(made() if callable(made) else made, max_new_tokens=5, eos_token_ids=[])
    assert [chunk.token_id for chunk in chunks][:-1] == expected[0]


TWO_PROMPTS: dict[str, Any] = {
    "generator of lists": lambda: iter([IDS, OTHER]),
    "tuple of tuples": (tuple(IDS), tuple(OTHER)),
    "list of arrays": [np.array(IDS), torch.tensor(OTHER)],
    "list of generators": lambda: [iter(IDS), iter(OTHER)],
    "dict": {"input_ids": [IDS, OTHER]},
    "padded dict": {"input_ids": [IDS, [0, *OTHER]], "attention_mask": [[1, 1, 1], [0, 1, 1]]},
    "padded tensors": {
        "input_ids": torch.tensor([IDS, [*OTHER, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    },
    "list of dicts": [{"input_ids": IDS}, {"input_ids": OTHER}],
    "numpy of lists": np.array([IDS, OTHER], dtype=object),
}


@pytest.mark.parametrize("name", TWO_PROMPTS)
def test_two_prompts_in_any_container(engine: Engine, name: str) -> None:
    made = TWO_PROMPTS[name]
    assert tokens(engine, made() if callable(made) else made) == tokens(engine, [IDS, OTHER])
    with pytest.raises(RequestError, match="one prompt is taken here, got 2"):
        next(engine.stream(made() if callable(made) else made))


def test_texts(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    expected = tokens(engine, [[BOS, *b"a"], [BOS, *b"bc"]])
    for texts in (["a", "bc"], ("a", "bc"), iter(["a", "bc"]), np.array(["a", "bc"])):
        assert tokens(engine, texts) == expected
    assert tokens(engine, tokenizer(["a", "bc"])) == expected
    assert tokens(engine, tokenizer(["a", "bc"], padding=True, return_tensors="pt")) == expected
    assert tokens(engine, tokenizer("a")) == expected[:1]
    assert tokens(engine, np.str_("a")) == expected[:1]
    assert tokens(engine, tokenizer("a").encodings[0]) == expected[:1]


def test_chats(engine: Engine) -> None:
    rendered = [*b"user:hi;"]  # the template says which special tokens there are
    expected = tokens(engine, [rendered])
    for chat in (MESSAGE, [MESSAGE], (MESSAGE,), [[MESSAGE]], iter([MESSAGE]), collections.UserDict(MESSAGE)):
        assert tokens(engine, chat) == expected
    assert tokens(engine, [[MESSAGE], [MESSAGE], "a"]) == tokens(engine, [rendered, rendered, "a"])


REFUSED: dict[str, Any] = {
    "bytes": b"text",
    "bytearray": bytearray(b"text"),
    "memoryview": memoryview(b"text"),
    "list of bytes": [b"text"],
    "None": None,
    "list of None": [None],
    "int": 5,
    "float": 5.0,
    "list of floats": [5.0, 6.0],
    "list of bools": [True, False],
    "dict of prompts": {"first": "a", "second": "b"},
    "empty dict": {},
    "dict of text": {"input_ids": "abc"},
    "dict of messages": {"input_ids": [MESSAGE]},
    "images beside ids": {"input_ids": IDS, "pixel_values": torch.zeros(1)},
    "message without role": [{"content": "hi"}],
    "role of no text": [{"role": 3, "content": "hi"}],
    "message and text": [MESSAGE, "text"],
    "message and id": [MESSAGE, 3],
    "content of bytes": [{"role": "user", "content": b"hi"}],
    "content of numbers": [{"role": "user", "content": 5}],
    "no content": [{"role": "user"}],
    "ids and texts": [5, "a"],
    "ids and lists": [5, [6]],
    "texts and ids inside": [["a", 5]],
    "list of lists of texts": [["a"]],
    "three dimensions": torch.zeros(1, 1, 3, dtype=torch.long),
    "no dimension": torch.tensor(5),
    "float tensor": torch.zeros(3),
    "bool tensor": torch.ones(3, dtype=torch.bool),
    "float array": np.zeros(3),
    "bool array": np.ones(3, dtype=bool),
    "complex array": np.zeros(3, dtype=complex),
    "set": {5, 6},
    "frozenset": frozenset("a"),
    "path": Path("a"),
    "file": io.StringIO("a\nb"),
    "function": len,
    "class": str,
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("entry", ["generate", "stream", "encode"])
def test_what_is_no_prompt_is_a_type_error(engine: Engine, name: str, entry: str) -> None:
    ask: dict[str, Callable[[Any], Any]] = {
        "generate": lambda prompt: engine.generate(prompt, max_new_tokens=2),
        "stream": lambda prompt: next(engine.stream(prompt, max_new_tokens=2)),
        "encode": engine.encode,
    }
    with pytest.raises(TypeError) as caught:
        ask[entry](REFUSED[name])
    assert isinstance(caught.value, SkipkernelsError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no prompt was given"),
        (iter([]), "no prompt was given"),
        ([10**30], "outside the vocabulary"),
        ([-1], "outside the vocabulary"),
        ("a\ud800", "not valid Unicode"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "leaves out tokens between others"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, "differ in shape"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(prompt, max_new_tokens=2)


def test_a_template_that_raises_is_one_line() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(RequestError, match=r"the chat template refuses this chat \(roles must alternate\)"):
        tiny_engine(tokenizer=tokenizer).generate([MESSAGE], max_new_tokens=2)


def test_a_second_bos_is_warned_of(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert engine.encode("<s>hi")[:2] == [BOS, BOS]  # as transformers encodes it
        assert "begins with <s> and the tokenizer adds another" in caplog.text
        caplog.clear()
        engine.encode("hi <s>")
    assert not caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "x"}, "stop must be a list of strings, got one string"),
        ({"stop": [b"x"]}, "stop must be a list of strings, got a bytes in it"),
        ({"stop": 5}, "stop must be a list of strings"),
        ({"stop": [""]}, "must not be empty"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"eos_token_ids": "x"}, "eos_token_ids must be integers"),
        ({"eos_token_ids": [1.5]}, "must be an integer"),
        ({"eos_token_ids": 1.5}, "eos_token_ids must be integers"),
    ],
)
def test_other_arguments_of_the_wrong_kind_are_refused(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        engine.generate(IDS, **options)


def test_a_policy_that_is_none_is_refused(engine: Engine) -> None:
    with pytest.raises(PolicyError, match="a policy is wanted, got a str"):
        engine.generate(IDS, policy="skip_policy.json")  # type: ignore[arg-type]


def test_ends_may_be_one_or_any_container(engine: Engine) -> None:
    free = tokens(engine, [IDS])[0]
    for eos in (free[2], [free[2]], np.array([free[2]]), torch.tensor([free[2]]), {free[2], -5}, iter([free[2]])):
        (answer,) = engine.generate(IDS, max_new_tokens=5, eos_token_ids=eos)
        assert answer.token_ids == free[: free.index(free[2]) + 1]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": 1.5},
        {"top_p": None},
        {"seed": "x"},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e35},
        {"repetition_penalty": [1.0]},
    ],
)
def test_sampling_parameters_of_the_wrong_kind_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(values))):
        SamplingParams(**values)


@pytest.mark.parametrize("temperature", [1e-30, 1e-31, 1e-38, 1e-45, 1e-46, 5e-324])
def test_a_temperature_that_would_overflow_is_greedy(temperature: float) -> None:
    module = tiny_module()
    engine = tiny_engine(module=module)
    (greedy,) = engine.generate(IDS, max_new_tokens=12)
    for seed in range(3):
        sampling = SamplingParams(temperature=temperature, top_p=0.9, top_k=20, min_p=0.01, seed=seed)
        (answer,) = engine.generate(IDS, max_new_tokens=12, sampling=sampling)
        assert answer.token_ids == greedy.token_ids
