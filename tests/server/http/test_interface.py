"""What ordinary clients send and expect: values that change nothing, methods, headers, other interfaces."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.chat.engine_worker import EngineWorker
from skipkernels.chat.text_model import TextModel, exact_match
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.modality.profile import Profile
from skipkernels.modality.runtime import Runtime
from skipkernels.server.http.app import create_app
from skipkernels.server.http.backend import Embedded
from skipkernels.server.http.service import Service
from skipkernels.skipping.policy import DensePolicy, SkipPolicy
from tests.modality.profiles import entry
from tests.models import tiny_engine, tiny_module
from tests.server.http.fakes import COMPLETIONS, EchoModel, body, client_of, echo_service

SKIPPING = SkipPolicy(threshold=0.5, span=2, first_dense_layers=0, warmup_tokens=1, target_ratio=0.3)


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    module = tiny_module(num_hidden_layers=10)
    return tiny_engine(module=module, tokenizer=tokenizer, max_batch_size=4, max_seq_len=200)


def real_service(engine: Engine, **options: Any) -> Service:
    model = TextModel("tiny", engine, {0.0: DensePolicy(), 0.3: SKIPPING}, exact_match)
    entries = (entry("text@0", 0.9, 100.0), replace(entry("text@0.3", 0.5, 60.0), kl=0.2))
    profile = Profile("tiny", model.fingerprint, model.device, model.dtype, entries)
    backend = Embedded(Runtime(profile, [EngineWorker(model)]), engine.loop.cache_status)
    return Service(profile, model.format, backend, **options)


def ask(service: Service, path: str, document: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
    async def exchange() -> httpx.Response:
        async with client_of(service) as client:
            if document is None:
                return await client.request(options.pop("method", "GET"), path, **options)
            return await client.post(path, json=document, **options)

    return asyncio.run(exchange())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


NEUTRAL: dict[str, Any] = {
    "logprobs": False,
    "top_logprobs": None,
    "tools": [],
    "tool_choice": "auto",
    "logit_bias": {},
    "response_format": {"type": "text"},
    "store": False,
    "metadata": {"a": "b"},
    "user": "me",
    "stop": None,
    "n": 1,
    "frequency_penalty": 0,
    "stream": False,
    "stream_options": None,
    "parallel_tool_calls": True,
}


@pytest.mark.parametrize("strict", [False, True])
def test_values_that_change_nothing_are_accepted(strict: bool) -> None:
    messages = [
        {"role": "user", "content": "x", "name": "me"},
        {"role": "assistant", "content": "y", "refusal": None, "audio": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "z", "tool_call_id": "1"},
        *({"role": "user", "content": "hello"} for _ in range(70)),
    ]
    service = echo_service(EchoModel(), strict=strict)
    response = ask(service, COMPLETIONS, body() | NEUTRAL | {"messages": messages})
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == "hello "
    assert "x-skipkernels-ignored" not in response.headers


def test_unknown_fields_are_named_or_refused() -> None:
    document = body(thinking_budget=5) | {"messages": [{"role": "user", "content": "a b", "mood": "good"}]}
    response = ask(echo_service(EchoModel()), COMPLETIONS, document)
    assert response.headers["x-skipkernels-ignored"] == "thinking_budget, messages.0.mood"
    response = ask(echo_service(EchoModel()), COMPLETIONS, body() | {"a\r\nset-cookie: b": 1, "ä": 2})
    assert response.headers["x-skipkernels-ignored"] == "a??set-cookie??b, ?"
    refused = ask(echo_service(EchoModel(), strict=True), COMPLETIONS, document)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "thinking_budget"


def test_methods_slashes_origins_and_ids() -> None:
    service = echo_service()
    open_to_pages = Service(
        service.profile, service.converter.chat_format, service.backend, cors_origins=["https://page.example"]
    )

    async def exchange() -> None:
        async with client_of(open_to_pages) as client:
            assert (await client.head("/v1/models")).status_code == 200
            assert (await client.get("/v1/models/")).status_code == 200
            options = await client.request("OPTIONS", COMPLETIONS)
            assert (options.status_code, options.headers["allow"]) == (204, "POST")
            options = await client.request("OPTIONS", "/v1/models")
            assert (options.status_code, options.headers["allow"]) == (204, "GET, HEAD")
            preflight = {"origin": "https://page.example", "access-control-request-method": "POST"}
            allowed = await client.request("OPTIONS", COMPLETIONS, headers=preflight)
            assert allowed.headers["access-control-allow-origin"] == "https://page.example"
            named = await client.get("/health", headers={"x-request-id": "mine-1"})
            assert named.headers["x-request-id"] == "mine-1"
            invented = await client.get("/health", headers={"x-request-id": "two words"})
            assert invented.headers["x-request-id"].startswith("req_")

    asyncio.run(exchange())
    assert "access-control-allow-origin" not in ask(echo_service(), "/health", headers={"origin": "https://x"}).headers


def test_a_wrong_key_is_counted() -> None:
    async def exchange() -> str:
        async with client_of(echo_service(api_key="k")) as client:
            assert (await client.get("/v1/models")).status_code == 401
            return (await client.get("/metrics", headers={"authorization": "Bearer k"})).text

    assert 'request_errors_total{code="invalid_api_key",status="401"} 1.0' in asyncio.run(exchange())


def test_several_answers_with_log_probabilities(engine: Engine) -> None:
    document = {
        "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "n": 3, "temperature": 1.0, "seed": 1,
        "max_tokens": 6, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = ask(real_service(engine), COMPLETIONS, document).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) > 1
    for choice in whole["choices"]:
        told = choice["logprobs"]["content"]
        assert len(told) == 6 or choice["finish_reason"] == "stop"
        for token in told:
            assert token["logprob"] <= token["top_logprobs"][0]["logprob"] <= 0
            assert len(token["top_logprobs"]) == 2
    assert whole["usage"]["prompt_tokens"] < 12  # counted once
    streamed = events(ask(real_service(engine), COMPLETIONS, document | {"stream": True}))
    for index, choice in enumerate(whole["choices"]):
        chunks = [c for event in streamed for c in event["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in chunks) == choice["message"]["content"]
        told = [token for c in chunks if c["logprobs"] for token in c["logprobs"]["content"]]
        assert told == choice["logprobs"]["content"]


def test_completions_echo_the_prompt_with_its_log_probabilities(engine: Engine) -> None:
    prompts = [engine.encode("the quick brown"), engine.encode("fox")]
    document = {"model": "tiny", "prompt": prompts, "max_tokens": 3, "echo": True, "logprobs": 1}
    answer = ask(real_service(engine), "/v1/completions", document).json()
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        (alone,) = engine.generate([prompt], max_new_tokens=3, eos_token_ids=())
        told = choice["logprobs"]
        assert told["token_logprobs"][0] is None
        assert len(told["tokens"]) == len(prompt) + len(alone.token_ids)
        assert choice["text"].startswith("".join(told["tokens"][1 : len(prompt)]))
        assert choice["text"].endswith(alone.text)
        for text, own, top in list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True))[1:]:
            ((likeliest, most),) = top.items()
            assert own <= most + 1e-6
            assert own < most or likeliest == text
        *_, a, b, c = zip(told["tokens"], told["top_logprobs"], strict=True)
        assert all(text in top for text, top in (a, b, c))  # greedy tokens are the likeliest
    only = ask(real_service(engine), "/v1/completions", document | {"max_tokens": 0}).json()
    assert [len(choice["logprobs"]["tokens"]) for choice in only["choices"]] == [len(prompt) for prompt in prompts]
    assert only["usage"]["completion_tokens"] == 0
    for wrong, part in (({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"stop": "a"}, "neither stop")):
        refused = ask(real_service(engine), "/v1/completions", document | wrong)
        assert refused.status_code == 400
        assert part in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [(COMPLETIONS, {"messages": [{"role": "user", "content": "the quick"}]}), ("/v1/completions", {"prompt": "fox"})],
)
def test_a_bias_of_a_token_that_does_not_exist_is_refused(engine: Engine, path: str, asked: dict[str, Any]) -> None:
    refused = ask(real_service(engine), path, {"model": "tiny", "logit_bias": {"999999": 5}} | asked)
    assert refused.status_code == 400
    assert "token id 999999 is outside the vocabulary" in refused.json()["error"]["message"]


def test_a_skip_level_can_be_asked_for(engine: Engine) -> None:
    document = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 60, "skip_level": 0.3}
    asked = ask(real_service(engine), "/v1/completions", document).json()["skipkernels"]
    assert asked["strategy"] == "text@0.3"
    assert asked["bytes_not_read"] > 0
    assert asked["time_to_first_token_ms"] <= asked["time_ms"]
    refused = ask(real_service(engine), "/v1/completions", document | {"min_accuracy": 0.8})
    assert refused.json()["error"]["code"] == "accuracy_unreachable"


def test_responses_and_tokens(engine: Engine) -> None:
    service = real_service(engine)
    asked = {"model": "tiny", "input": "hello there", "max_output_tokens": 8}
    whole = ask(service, "/v1/responses", asked).json()
    text = whole["output"][0]["content"][0]["text"]
    streamed = events(ask(real_service(engine), "/v1/responses", asked | {"stream": True}))
    assert [event["sequence_number"] for event in streamed] == list(range(len(streamed)))
    assert "".join(event["delta"] for event in streamed if event["type"] == "response.output_text.delta") == text
    assert streamed[-1]["type"] == f"response.{whole['status']}"
    assert streamed[-1]["response"]["usage"] == whole["usage"]
    tokens = ask(real_service(engine), "/tokenize", {"prompt": "hello there"}).json()
    assert tokens["tokens"] == engine.encode("hello there")
    assert ask(real_service(engine), "/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "<s>hello there"}
    refused = ask(real_service(engine), "/detokenize", {"tokens": [1 << 30]})
    assert "outside the vocabulary" in refused.json()["error"]["message"]


def test_a_response_follows_its_format(engine: Engine) -> None:
    pytest.importorskip("llguidance")
    asked = {"model": "tiny", "input": "hello there", "max_output_tokens": 16}
    wanted = {"type": "json_schema", "name": "answer", "schema": {"const": "ab"}}
    whole = ask(real_service(engine), "/v1/responses", asked | {"text": {"format": wanted}}).json()
    assert json.loads(whole["output"][0]["content"][0]["text"]) == "ab"
    assert whole["status"] == whole["output"][0]["status"] == "completed"
    cut = ask(real_service(engine), "/v1/responses", asked | {"max_output_tokens": 2}).json()
    assert cut["status"] == cut["output"][0]["status"] == "incomplete"
    del wanted["schema"]
    refused = ask(real_service(engine), "/v1/responses", asked | {"text": {"format": wanted}})
    assert refused.json()["error"]["message"] == "text.format: json_schema needs a schema"


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("tools", [{"type": "web_search"}], "/v1/chat/completions"),
        ("previous_response_id", "resp_1", "whole conversation"),
        ("conversation", {"id": "conv_1"}, "all of it"),
        ("background", True, "leave it out"),
    ],
)
def test_what_would_change_a_response_is_refused(engine: Engine, field: str, value: object, part: str) -> None:
    asked = {"model": "tiny", "input": "hello there", "max_output_tokens": 2}
    refused = ask(real_service(engine), "/v1/responses", asked | {field: value})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == field
    assert part in refused.json()["error"]["message"]
    neutral = ask(real_service(engine), "/v1/responses", asked | {field: None})
    assert neutral.status_code == 200


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        (["a"] * 129, "at most 128"),
        ([[1]] * 129, "at most 128"),
        (5, "a text, token ids, or an array of either"),
        (None, "a text, token ids, or an array of either"),
        (["a", 5], "string"),
    ],
)
def test_a_wrong_prompt_is_named(engine: Engine, prompt: object, part: str) -> None:
    error = ask(real_service(engine), "/v1/completions", {"model": "tiny", "prompt": prompt}).json()["error"]
    assert error["param"].startswith("prompt")
    assert "constrained" not in error["param"]
    assert part in error["message"]
    error = ask(real_service(engine), "/v1/responses", {"model": "tiny", "input": 5}).json()["error"]
    assert error["message"] == "input: input must be a text or an array of messages"


def test_a_grammar_needs_its_package_or_is_followed(engine: Engine) -> None:
    document = {"model": "tiny", "prompt": "x", "max_tokens": 20, "guided_regex": "[ab]{3}"}
    response = ask(real_service(engine), "/v1/completions", document)
    try:
        import llguidance  # noqa: F401
    except ImportError:
        assert response.status_code == 400
        assert "skipkernels[grammar]" in response.json()["error"]["message"]
        return
    choice = response.json()["choices"][0]
    assert set(choice["text"]) <= {"a", "b"}
    assert len(choice["text"]) == 3
    wrong = ask(real_service(engine), "/v1/completions", document | {"guided_regex": "[a"})
    assert wrong.status_code == 400


def test_the_document_of_the_routes_has_no_loose_ends() -> None:
    document = create_app(echo_service()).openapi()
    assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"}
    assert "$defs" not in json.dumps(document)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"200", "503" if path == "/health" else "4XX"} <= set(operation["responses"]), path
    answers = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(answers) == {"application/json", "text/event-stream"}


def test_an_echo_is_what_was_said(engine: Engine) -> None:
    """The token that the tokenizer puts in front is in the lists of tokens, where it has no log probability; it is no
    text."""
    asked = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 4, "echo": True}
    plain = ask(real_service(engine), "/v1/completions", asked).json()["choices"][0]["text"]
    assert plain.startswith("the quick brown fox")
    told = ask(real_service(engine), "/v1/completions", asked | {"logprobs": 0}).json()["choices"][0]
    assert told["text"] == plain
    logprobs = told["logprobs"]
    assert logprobs["tokens"][0] == "<s>"
    assert logprobs["token_logprobs"][0] is None
    first, second = logprobs["text_offset"][:2]
    assert (first, second) == (0, 0)
    for offset, token in list(zip(logprobs["text_offset"], logprobs["tokens"], strict=True))[1:20]:
        assert plain[offset:].startswith(token)


def test_tools_are_not_dropped_in_silence(engine: Engine) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "the quick"}], "max_tokens": 4, "tools": [tool]}
    for choice in ("auto", "required"):
        refused = ask(real_service(engine), COMPLETIONS, asked | {"tool_choice": choice})
        assert refused.status_code == 400
        assert "knows no tools" in refused.json()["error"]["message"]
    assert ask(real_service(engine), COMPLETIONS, asked | {"tool_choice": "none"}).status_code == 200


def test_what_the_engine_refuses_is_a_400(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RequestError("this prompt is not for this model")

    monkeypatch.setattr(engine, "submit", refuse)
    refused = ask(real_service(engine), "/v1/completions", {"model": "tiny", "prompt": "fox", "max_tokens": 4})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "this prompt is not for this model"


def test_the_largest_saving_within_a_divergence(engine: Engine) -> None:
    document = {"model": "tiny", "prompt": "the quick brown fox", "max_tokens": 60}
    for max_kl, strategy, kl in ((0.4, "text@0.3", 0.2), (0.1, "text@0", 0.0)):
        told = ask(real_service(engine), "/v1/completions", document | {"max_kl": max_kl}).json()["skipkernels"]
        assert (told["strategy"], told["measured_kl"]) == (strategy, kl)
    refused = ask(real_service(engine), "/v1/completions", document | {"max_kl": 0.1, "skip_level": 0.3})
    assert refused.status_code == 400
    assert "within max_kl 0.1" in refused.json()["error"]["message"]


def test_an_answer_is_as_long_as_asked_where_the_end_is_ignored(engine: Engine) -> None:
    (end,) = engine.default_eos_token_ids
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 5, "logit_bias": {str(end): 100}}
    answers = [ask(real_service(engine), "/v1/completions", asked | more).json() for more in ({}, {"ignore_eos": True})]
    assert [answer["usage"]["completion_tokens"] for answer in answers] == [1, 5]
    assert [answer["choices"][0]["finish_reason"] for answer in answers] == ["stop", "length"]
    both = ask(real_service(engine), "/v1/completions", asked | {"ignore_eos": True, "guided_regex": "a+"})
    assert (both.status_code, both.json()["error"]["param"]) == (400, "ignore_eos")
