"""Clients that people use, on a real socket: OpenAI's own, and litellm, through which many others ask."""

import os
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from skipkernels.engine import Engine
from tests.server.http.running import running
from tests.server.http.test_interface import engine, real_service  # noqa: F401  # a fixture

ASKED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "the quick brown fox"}]}


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:  # noqa: F811
    with running(real_service(engine)) as server:
        yield f"{server.url}/v1"


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
        yield client


def test_a_stream_of_openai_is_its_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**ASKED, max_completion_tokens=8)
    assert whole.usage is not None
    assert 0 < whole.usage.completion_tokens <= 8
    chunks = list(
        client.chat.completions.create(
            **ASKED, max_completion_tokens=8, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_openais_further_interfaces(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    echoed = client.completions.create(model="tiny", prompt="the quick", max_tokens=4, echo=True, logprobs=1)
    assert echoed.choices[0].text.startswith("the quick")
    assert echoed.choices[0].logprobs is not None
    answer = client.responses.create(model="tiny", input="the quick brown fox", max_output_tokens=8)
    with client.responses.stream(model="tiny", input="the quick brown fox", max_output_tokens=8) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert streamed == answer.output_text != ""


def test_openai_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.chat.completions.create(**ASKED | {"model": "other"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**ASKED, temperature=9.0)


def test_litellm_asks_and_streams(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network when imported
    litellm = pytest.importorskip("litellm")
    asked = ASKED | {"model": "openai/tiny", "api_base": url, "api_key": "any", "max_tokens": 8, "num_retries": 0}
    whole = litellm.completion(**asked, extra_body={"skip_level": 0.3})
    assert whole.usage.completion_tokens <= 8
    assert whole.skipkernels["strategy"] == "text@0.3"
    said = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
    assert "".join(said) == litellm.completion(**asked).choices[0].message.content != ""
