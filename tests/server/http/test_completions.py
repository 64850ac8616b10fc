"""What OpenAI's clients get: whole answers, streams, models, health."""

import asyncio
import json
from typing import Any

import httpx
import numpy as np
import pytest

from skipkernels.decoding.generation import SamplingParams
from skipkernels.modality.errors import JobError
from skipkernels.modality.profile import Profile
from skipkernels.server.http.documents import model_document
from tests.modality.test_worth import ALONE_ONLY, DENSE, SLOWER, timed
from tests.server.http.fakes import COMPLETIONS, REACHABLE, EchoFormat, EchoModel, body, client_of, echo_service
from tests.server.http.media import audio_part, image_part, text_part


def post(model: EchoModel | None = None, **fields: Any) -> httpx.Response:
    async def exchange() -> httpx.Response:
        async with client_of(echo_service(model)) as client:
            return await client.post(COMPLETIONS, json=body(**fields))

    return asyncio.run(exchange())


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream that ends as it should."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk.get("choices", []))


def test_a_whole_answer() -> None:
    response = post(min_accuracy=0.75)
    assert response.status_code == 200
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "echo"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "one two three ", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    extension = answer["skipkernels"]
    assert extension["strategy"] == "text@0"
    assert extension["promised_accuracy"] >= 0.75
    assert 0 < extension["time_ms"] < 5000
    assert (extension["deadline_met"], extension["retried"], extension["skip_ratio"]) == (True, False, 0.0)


def test_a_stream_comes_word_by_word() -> None:
    first, *words, last = events(post(stream=True))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in words] == [
        {"content": word} for word in ("one ", "two ", "three ")
    ]
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["delta"] == {}
    assert last["skipkernels"]["strategy"].startswith("text@")
    assert len({chunk["id"] for chunk in (first, *words, last)}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in (first, *words, last))


def test_the_usage_of_a_stream_on_request() -> None:
    *_, last = events(post(stream=True, stream_options={"include_usage": True}, max_tokens=2))
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_model_that_says_all_at_the_end_can_be_streamed() -> None:
    assert text_of(events(post(text="be mute now", stream=True))) == "be mute now "


def test_a_stream_that_begins_again_on_another_worker_goes_on_where_it_was() -> None:
    chunks = events(post(text="stumble and go on", stream=True))
    assert text_of(chunks) == "stumble and go on "
    assert chunks[-1]["skipkernels"]["retried"]


def test_a_stream_that_comes_out_differently_the_second_time_says_so() -> None:
    *chunks, last = events(post(text="fickle you are", stream=True))
    assert text_of(chunks) == "fickle "
    assert last["error"]["code"] == "job_failed"
    assert "gave a different answer" in last["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_wrong_before_the_first_word_is_an_error_in_either_case(stream: bool) -> None:
    response = post(text="fail", stream=stream)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "it was told to fail" in response.json()["error"]["message"]


def test_images_and_recordings_reach_the_model_decoded() -> None:
    model = EchoModel()
    response = post(model, text=[text_part("look and listen"), image_part(), audio_part()], min_accuracy=0.99)
    assert response.json()["skipkernels"]["strategy"] == "audio+image+text@0"
    ((_, (inputs,)),) = model.batches
    (image,), (audio,) = inputs["image"], inputs["audio"]
    assert image.pixels.shape == (3, 4, 3)
    np.testing.assert_array_equal(image.pixels[0, 0], (255, 0, 0))
    assert audio.samples.shape == (4000,)
    assert audio.rate_hz == 8000
    assert audio.samples.dtype == np.float32
    np.testing.assert_array_equal(audio.samples, np.float32(0.25))


def test_an_empty_stop_text_is_none() -> None:
    model = EchoModel()
    assert post(model, stop="").status_code == 200
    ((_, (inputs,)),) = model.batches
    assert inputs["text"][0].stop == ()


def test_every_field_reaches_the_model() -> None:
    model = EchoModel()
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 5}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [text_part("a "), text_part("b")]},
    ]
    response = post(model, messages=messages, stop="x", max_completion_tokens=9, user="somebody", **fields)
    assert response.status_code == 200
    ((_, (inputs,)),) = model.batches
    chat, text = inputs["text"]
    assert text == "a b"
    assert [(message.role, message.text) for message in chat.messages] == [("system", "be brief"), ("user", "a b")]
    assert (chat.stop, chat.max_new_tokens) == (("x",), 9)
    assert chat.sampling == SamplingParams(0.5, 7, 0.9, 0.1, 1.1, 5)


def test_decoding_is_greedy_unless_a_temperature_is_given() -> None:
    model = EchoModel()
    post(model)
    post(model, temperature=1)
    greedy, drawn = (inputs["text"][0].sampling for _, (inputs,) in model.batches)
    assert greedy.temperature == 0.0
    assert drawn.temperature == 1.0
    assert greedy.seed != drawn.seed  # a seed of its own for each request that brings none


def test_the_deadline_and_the_accuracy_choose_the_strategy() -> None:
    """Text alone takes 3 s dense and 2.5 s skipping, says the profile."""
    hurried = post(deadline_ms=2800).json()["skipkernels"]["strategy"]
    assert hurried == "text@0.5"
    careful = post(min_accuracy=REACHABLE, deadline_ms=2800).json()["skipkernels"]
    assert careful["strategy"] == "text@0"
    assert careful["promised_accuracy"] == REACHABLE


def test_models_lists_the_model_and_its_strategies() -> None:
    async def exchange() -> Any:
        async with client_of(echo_service()) as client:
            return (await client.get("/v1/models")).json()

    (model,) = asyncio.run(exchange())["data"]
    assert (model["id"], model["object"]) == ("echo", "model")
    assert set(model["skipkernels"]["modalities"]) == {"text", "image", "audio"}
    strategies = {entry["strategy"]: entry for entry in model["skipkernels"]["strategies"]}
    assert len(strategies) == 8
    assert strategies["text@0"]["promised_accuracy"] == REACHABLE
    assert not model["skipkernels"]["profiling"]
    assert {tuple(entry["offered_at"]) for entry in strategies.values()} == {(1, 2, 4, 8)}


def test_a_strategy_that_saves_no_time_is_listed_as_one_to_ask_for() -> None:
    entries = (timed("text@0", 1.0, DENSE), timed("text@0.2", 0.23, SLOWER), timed("text@0.5", 0.1, ALONE_ONLY))
    made_up = Profile("echo", "echo-1", "cpu", "fp32", entries, measuring=True)
    told = model_document(made_up, EchoFormat(), 0)["skipkernels"]
    assert [entry["offered_at"] for entry in told["strategies"]] == [[1, 4, 16], [], [1]]
    assert told["profiling"]
    with pytest.raises(
        JobError, match=r"no strategy has skip_level 0.7; there are 0, 0.2, 0.5; more are being measured"
    ):
        made_up.usable(("text",), 0.7)


def test_a_model_is_found_by_its_name() -> None:
    async def exchange() -> tuple[httpx.Response, ...]:
        async with client_of(echo_service()) as client:
            return tuple([await client.get(f"/v1/models{name}") for name in ("", "/echo", "/a/folder")])

    whole, found, unknown = asyncio.run(exchange())
    assert found.json() == whole.json()["data"][0]
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert "'echo' is" in unknown.json()["error"]["message"]


def test_health_is_bad_once_the_service_closes() -> None:
    async def exchange() -> tuple[httpx.Response, httpx.Response, httpx.Response]:
        service = echo_service()
        async with client_of(service) as client:
            before = await client.get("/health")
            await service.close(1.0)
            return before, await client.get("/health"), await client.post(COMPLETIONS, json=body())

    before, after, refused = asyncio.run(exchange())
    assert (before.status_code, before.json()) == (200, {"status": "ok"})
    assert after.status_code == refused.status_code == 503
    assert refused.json()["error"]["code"] == "service_closed"
