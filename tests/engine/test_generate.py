"""Requests: what ends a generation, what comes back, and what the next one finds."""

import numpy as np
import pytest
from transformers import GenerationConfig, PreTrainedTokenizerBase

from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.skipping.policy import DensePolicy, FixedPolicy
from tests.models import BOS, EOS, random_prompt, stock_tokens, tiny_engine, tiny_module

PROMPT = random_prompt(6)


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    return tiny_engine(max_seq_len=64, max_batch_size=3, tokenizer=tokenizer, module=tiny_module())


@pytest.fixture(scope="module")
def tokens(engine: Engine) -> list[int]:
    """Thirty tokens that follow PROMPT."""
    return engine.generate(PROMPT, max_new_tokens=30, eos_token_ids=[])[0].token_ids


def test_an_answer_tells_what_happened(engine: Engine, tokens: list[int]) -> None:
    (answer,) = engine.generate(PROMPT, max_new_tokens=30)
    assert answer.token_ids == tokens
    assert answer.finish_reason == "length"
    assert answer.prompt_tokens == 6
    assert answer.skip_map.shape == answer.similarity_map.shape == (30, 4)
    assert len(answer.seconds_per_token) == 30
    assert answer.time_to_first_token_s >= answer.seconds_per_token[0] > 0
    assert answer.tokens_per_s == pytest.approx(29 / sum(answer.seconds_per_token[1:]))
    assert answer.text == engine.tokenizer.decode(tokens, skip_special_tokens=True)


def test_answers_keep_their_maps_when_the_engine_goes_on(engine: Engine) -> None:
    (answer,) = engine.generate(PROMPT, max_new_tokens=8, policy=FixedPolicy((1,), warmup_tokens=0))
    before = answer.skip_map.copy()
    engine.generate(random_prompt(6, seed=1), max_new_tokens=8)
    assert (answer.skip_map == before).all()
    assert before[1:, 1].all()


def test_one_token(engine: Engine, tokens: list[int]) -> None:
    (answer,) = engine.generate(PROMPT, max_new_tokens=1)
    assert answer.token_ids == tokens[:1]
    assert answer.tokens_per_s == 0


@pytest.mark.parametrize("at", [0, 3])
def test_any_of_the_eos_tokens_ends_a_generation(engine: Engine, tokens: list[int], at: int) -> None:
    first = tokens.index(tokens[at])
    (answer,) = engine.generate(PROMPT, max_new_tokens=30, eos_token_ids=[258, tokens[at], 258])
    assert answer.token_ids == tokens[: first + 1]
    assert answer.finish_reason == "stop"
    assert answer.text == engine.tokenizer.decode(tokens[:first], skip_special_tokens=True)


def test_eos_tokens_default_to_the_models_own(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> None:
    module = tiny_module()
    module.generation_config = GenerationConfig(eos_token_id=[258, tokens[4]])
    engine = tiny_engine(module=module, tokenizer=tokenizer)
    assert engine.default_eos_token_ids == (258, tokens[4])
    assert engine.generate(PROMPT)[0].finish_reason == "stop"
    assert tiny_engine(module=tiny_module(), tokenizer=tokenizer).default_eos_token_ids == (EOS,)
    assert tiny_engine(module=tiny_module()).default_eos_token_ids == ()


def test_a_generation_ends_with_the_cache(engine: Engine) -> None:
    (answer,) = engine.generate(PROMPT, eos_token_ids=[])
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 64 - 6 + 1  # the last token is never cached
    assert answer.skip_map.shape == (59, 4)
    assert answer.token_ids == stock_tokens(tiny_module(), PROMPT, 59)


def test_a_prompt_may_fill_the_cache(engine: Engine) -> None:
    prompt = random_prompt(64)
    (answer,) = engine.generate(prompt)
    assert answer.token_ids == stock_tokens(tiny_module(), prompt, 1)


def test_a_prompt_of_one_token(engine: Engine) -> None:
    (answer,) = engine.generate([7], max_new_tokens=64, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(tiny_module(), [7], 64)


def test_an_empty_prompt_starts_from_bos(engine: Engine) -> None:
    from_bos = engine.generate([BOS], max_new_tokens=5)[0].token_ids
    assert engine.generate([[]], max_new_tokens=5)[0].token_ids == from_bos
    assert engine.generate("", max_new_tokens=5)[0].token_ids == from_bos


def test_an_empty_prompt_without_bos_is_refused() -> None:
    with pytest.raises(RequestError, match="prompt is empty and the model has no beginning-of-sequence token"):
        tiny_engine().generate([[]])


def test_prompts_may_be_text_ids_or_a_batch_of_both(engine: Engine) -> None:
    text, ids = "Hello", [BOS, *b"Hello"]
    (expected,) = engine.generate(ids, max_new_tokens=4)
    assert [answer.token_ids for answer in engine.generate([text, ids], max_new_tokens=4)] == [expected.token_ids] * 2
    assert engine.generate(text, max_new_tokens=4)[0].prompt_tokens == 6


def test_chats_go_through_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    engine = tiny_engine(tokenizer=tokenizer)
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(RequestError, match="no chat template"):
        engine.generate(chat)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}bot:"
    try:
        assert engine.encode(chat) in ([*b"user: Hi\nbot:"], [BOS, *b"user: Hi\nbot:"])
        expected = engine.generate(engine.encode(chat), max_new_tokens=4)[0].token_ids
        assert engine.generate(chat, max_new_tokens=4)[0].token_ids == expected
        assert engine.generate([chat], max_new_tokens=4)[0].token_ids == expected
    finally:
        tokenizer.chat_template = None


def test_a_policy_holds_for_one_call(engine: Engine) -> None:
    fixed = FixedPolicy((2,), warmup_tokens=0)
    assert engine.generate(PROMPT, max_new_tokens=4, policy=fixed)[0].skip_map[1:, 2].all()
    assert not engine.generate(PROMPT, max_new_tokens=4)[0].skip_map.any()
    sparse = tiny_engine(policy=fixed)
    assert sparse.generate(PROMPT, max_new_tokens=4)[0].skip_map.any()
    assert not sparse.generate(PROMPT, max_new_tokens=4, policy=DensePolicy())[0].skip_map.any()


def test_several_engines_do_not_disturb_each_other(tokens: list[int]) -> None:
    module = tiny_module()
    first, second = tiny_engine(module=module), tiny_engine("qwen3")
    third = tiny_engine(module=module, dtype="bf16", executor="reference")
    streams = [each.stream(PROMPT, max_new_tokens=10) for each in (first, second, third)]
    together = [[chunk.token_id for chunk in chunks] for chunks in zip(*streams, strict=True)]
    assert [row[0] for row in together[:10]] == tokens[:10]
    assert [row[1] for row in together[:10]] == stock_tokens(tiny_module("qwen3"), PROMPT, 10)


def test_the_stop_string_ends_a_generation(engine: Engine, tokens: list[int]) -> None:
    text = engine.tokenizer.decode(tokens)
    stop = text[4:6]
    (answer,) = engine.generate(PROMPT, max_new_tokens=30, stop=["never", stop])
    assert answer.finish_reason == "stop"
    assert answer.text == text[: text.index(stop)]
    assert answer.token_ids == tokens[: len(answer.token_ids)]
    assert len(answer.token_ids) == len(answer.skip_map) == len(answer.seconds_per_token) < 30


def test_rows_stop_each_at_their_own_string(engine: Engine) -> None:
    prompts = [random_prompt(5, seed) for seed in range(3)]
    alone = [engine.generate(prompt, max_new_tokens=20)[0] for prompt in prompts]
    stop = [alone[0].text[2:4], alone[1].text[6:8]]
    expected = [engine.generate(prompt, max_new_tokens=20, stop=stop)[0] for prompt in prompts]
    answers = engine.generate(prompts, max_new_tokens=20, stop=stop)
    assert [(a.token_ids, a.text, a.finish_reason) for a in answers] == [
        (a.token_ids, a.text, a.finish_reason) for a in expected
    ]
    assert len({len(answer.token_ids) for answer in answers}) > 1


def test_the_state_is_as_new_after_a_request(engine: Engine, tokens: list[int]) -> None:
    """Nothing of a sampled, skipping, stopped request shows in the next."""
    engine.generate(PROMPT, max_new_tokens=20, policy=FixedPolicy((1, 2), warmup_tokens=0), eos_token_ids=[tokens[2]])
    answers = engine.generate([PROMPT] * 3, max_new_tokens=30)
    assert [answer.token_ids for answer in answers] == [tokens] * 3
    assert np.isnan(answers[0].similarity_map).all()


def test_rows_of_an_abandoned_request_do_not_run_on(engine: Engine, tokens: list[int]) -> None:
    abandoned = engine.begin([random_prompt(5, seed) for seed in range(3)], eos_token_ids=[])
    abandoned.step(2)
    abandoned.end()
    assert engine.generate(PROMPT, max_new_tokens=30)[0].token_ids == tokens
    assert [len(row.token_ids) for row in abandoned.rows] == [2, 2, 2]
    with pytest.raises(RequestError, match="cancelled"):
        abandoned.results()
