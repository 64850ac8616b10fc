"""Whatever a client gets wrong is answered with a 4xx that says what, and the model hears nothing of it."""

import asyncio
import json
import math
from typing import Any

import httpx
import pytest

from tests.server.http.fakes import COMPLETIONS, REACHABLE, EchoModel, body, client_of, echo_service
from tests.server.http.media import audio_part, image_part, text_part


def post(content: bytes, content_type: str = "application/json") -> dict[str, Any]:
    """The error, and its status among its fields."""
    model = EchoModel()

    async def exchange() -> httpx.Response:
        async with client_of(echo_service(model)) as client:
            return await client.post(COMPLETIONS, content=content, headers={"content-type": content_type})

    response = asyncio.run(exchange())
    assert not model.batches
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error | {"status": response.status_code}


def refuse(**fields: Any) -> dict[str, Any]:
    return post(json.dumps(body(**fields)).encode())


def remote(url: str) -> list[dict[str, Any]]:
    return [text_part(), {"type": "image_url", "image_url": {"url": url}}]


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"deadline_ms": math.nan}, "deadline_ms", "finite"),
        ({"deadline_ms": math.inf}, "deadline_ms", "finite"),
        ({"deadline_ms": 0}, "deadline_ms", "greater than 0"),
        ({"deadline_ms": 1e308}, "deadline_ms", "less than or equal to 1000000000"),
        ({"deadline_ms": "soon"}, "deadline_ms", "number"),
        ({"min_accuracy": 1.5}, "min_accuracy", "less than or equal to 1"),
        ({"min_accuracy": math.nan}, "min_accuracy", "finite"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "hello"}, "messages", "array"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "messages.0.role", "user"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"text": 5}, "messages.0.content", "a text or an array of parts"),
        ({"text": []}, "messages.0.content", "at least 1"),
        ({"text": [{"type": "video_url"}]}, "messages.0.content.0", "text, image_url or input_audio"),
        ({"text": ""}, "messages", "hold no text"),
        ({"model": 5}, "model", "string"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "give one"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 1e-40}, "temperature", "at least 0.01"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "keys are token ids"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true only"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"skip_level": 1.0}, "skip_level", "less than 1"),
        ({"max_kl": -1}, "max_kl", "greater than or equal to 0"),
        ({"skip_level": 0.5, "max_kl": 0.1}, "max_kl", "by skip level: 0.5: not measured"),
        ({"skip_level": 0.25}, "skip_level", "no strategy has skip_level 0.25; there are 0, 0.5"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "give one"),
        ({"continue_final_message": True}, "continue_final_message", "assistant"),
        ({"tool_choice": "required"}, "tool_choice", "names no tool"),
        ({"seed": 1 << 63}, "seed", "less than"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stop": [""]}, "stop.0", "at least 1"),
        ({"stop": 5}, "stop", "a text or an array of texts"),
        ({"stop": ["a", 5]}, "stop.1", "string"),
        ({"text": [{"type": "image_url", "image_url": {}}]}, "messages.0.content.0.image_url.url", "required"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream: true only"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type", "function"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs a schema"),
        ({"text": remote("https://example.org/cat.png")}, "messages.0.content.1.image_url.url", "fetches nothing"),
        ({"text": remote("file:///etc/passwd")}, "messages.0.content.1.image_url.url", "data URI"),
        ({"text": remote("data:text/html;base64,AAAA")}, "messages.0.content.1.image_url.url", "data URI"),
        ({"text": remote("data:image/png;base64,@@@@")}, "messages.0.content.1.image_url.url", "base64"),
        ({"text": [text_part(), image_part(b"no picture")]}, "messages.0.content.1.image_url.url", "none of PNG"),
        (
            {"text": [text_part(), audio_part(b"no sound")]},
            "messages.0.content.1.input_audio.data",
            "none of WAV",
        ),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str | None, part: str) -> None:
    error = refuse(**fields)
    assert (error["status"], error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert part in error["message"]


def test_an_accuracy_above_the_best_reachable_is_told_the_reachable_one() -> None:
    """What the client can do: not what the operator could."""
    error = refuse(min_accuracy=0.95)
    assert (error["status"], error["code"], error["param"]) == (400, "accuracy_unreachable", "min_accuracy")
    reachable = f"{math.floor(REACHABLE * 1e4) / 1e4:.4f}"
    assert f"cannot be promised: at most {reachable} can, with text; ask for no more than that" in error["message"]
    assert "validation" not in error["message"]
    at_a_level = refuse(min_accuracy=0.95, skip_level=0.5)
    assert "can, with text at skip_level 0.5; ask for" in at_a_level["message"]


def test_another_model_is_not_found() -> None:
    error = refuse(model="gpt-17")
    assert (error["status"], error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'echo' is" in error["message"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'"text"',
        b"{}",
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 9999,
    ],
)
def test_what_is_no_request_at_all(content: bytes) -> None:
    assert post(content)["status"] == 400


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data", "application/x-www-form-urlencoded"])
def test_a_web_page_cannot_post_without_being_allowed(content_type: str) -> None:
    """These types need no permission across origins."""
    error = post(json.dumps(body()).encode(), content_type)
    assert (error["status"], error["code"]) == (415, "unsupported_media_type")


def test_a_deadline_that_cannot_be_met_is_refused_where_that_is_wanted() -> None:
    async def exchange() -> httpx.Response:
        async with client_of(echo_service(admission="deadline")) as client:
            return await client.post(COMPLETIONS, json=body(deadline_ms=20))

    response = asyncio.run(exchange())
    assert response.status_code == 429
    error = response.json()["error"]
    assert error["code"] == "deadline_unreachable"
    assert "a deadline of 20 ms cannot be met" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/no", 404), ("POST", "/v1/embeddings", 404), ("GET", COMPLETIONS, 405), ("DELETE", "/v1/models", 405)],
)
def test_other_routes(method: str, path: str, status: int) -> None:
    async def exchange() -> httpx.Response:
        async with client_of(echo_service()) as client:
            return await client.request(method, path)

    response = asyncio.run(exchange())
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_bug_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipkernels.server.http.conversion.Converter.chat_completion", lambda *_: 1 / 0)

    async def exchange() -> httpx.Response:
        async with client_of(echo_service(), raise_app_exceptions=False) as client:
            return await client.post(COMPLETIONS, json=body())

    response = asyncio.run(exchange())
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
