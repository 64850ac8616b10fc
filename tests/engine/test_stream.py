"""Streams: every token as it comes, and what happens when nobody listens any more."""

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.decoding.generation import SamplingParams
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from tests.models import random_prompt, tiny_engine, tiny_module

PROMPT = random_prompt(6)


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    return tiny_engine(module=tiny_module(), tokenizer=tokenizer)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stop", [(), ("e", "qu")])
def test_a_stream_is_generate_in_pieces(engine: Engine, seed: int, stop: tuple[str, ...]) -> None:
    """Random bytes are a mix of whole, broken and multi-byte characters."""
    options = {"max_new_tokens": 40, "sampling": SamplingParams(temperature=1.5, seed=seed), "stop": stop}
    (expected,) = engine.generate(PROMPT, **options)
    chunks = list(engine.stream(PROMPT, **options))
    assert [chunk.token_id for chunk in chunks[:-1]] == expected.token_ids
    assert "".join(chunk.text for chunk in chunks) == expected.text
    last = chunks[-1]
    assert last.token_id is None
    assert last.generation.text == expected.text
    assert last.generation.token_ids == expected.token_ids
    assert last.generation.finish_reason == expected.finish_reason
    assert all(chunk.generation is None for chunk in chunks[:-1])


def test_a_stream_without_a_tokenizer_has_tokens_and_no_text() -> None:
    chunks = list(tiny_engine().stream(PROMPT, max_new_tokens=3))
    assert [chunk.text for chunk in chunks] == [""] * 4
    assert chunks[-1].generation.text == ""


def test_an_aborted_stream_leaves_the_engine_usable(engine: Engine) -> None:
    expected = engine.generate(PROMPT, max_new_tokens=10)[0].token_ids
    stream = engine.stream(random_prompt(9, seed=1))
    next(stream)
    next(stream)
    stream.close()
    assert not engine.state.active.any()
    assert engine.generate(PROMPT, max_new_tokens=10)[0].token_ids == expected


def test_a_stream_that_was_left_open_does_not_end_the_next(engine: Engine) -> None:
    expected = [chunk.token_id for chunk in engine.stream(PROMPT, max_new_tokens=10)]
    abandoned = engine.stream(random_prompt(9, seed=1))
    next(abandoned)
    stream = engine.stream(PROMPT, max_new_tokens=10)
    tokens = [next(stream).token_id]
    abandoned.close()
    tokens += [chunk.token_id for chunk in stream]
    assert tokens == expected


def test_a_stream_that_was_taken_over_says_so(engine: Engine) -> None:
    abandoned = engine.stream(random_prompt(9, seed=1))
    next(abandoned)
    engine.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(RequestError, match="newer"):
        next(abandoned)


def test_a_wrong_request_touches_nothing(engine: Engine) -> None:
    stream = engine.stream(PROMPT, max_new_tokens=10)
    tokens = [next(stream).token_id]
    with pytest.raises(RequestError):
        engine.generate([PROMPT, PROMPT])
    with pytest.raises(RequestError):
        engine.generate([10**6])
    tokens += [chunk.token_id for chunk in stream]
    assert tokens[:-1] == engine.generate(PROMPT, max_new_tokens=10)[0].token_ids
