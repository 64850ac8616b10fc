"""Every refusal that is about one field names it in ``param``, wherever it is found: in the schema, by the tokenizer,
by the grammar, or by the scheduler."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.chat.engine_worker import EngineWorker
from skipkernels.chat.text_model import TextModel, exact_match
from skipkernels.modality.profile import Profile
from skipkernels.modality.runtime import Runtime
from skipkernels.server.http.backend import Embedded
from skipkernels.server.http.service import Service
from skipkernels.skipping.policy import DensePolicy, SkipPolicy
from tests.modality.profiles import entry
from tests.models import tiny_engine, tiny_module
from tests.server.http.fakes import client_of

CHATS, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MINIMAL: dict[str, dict[str, Any]] = {
    CHATS: {"messages": [{"role": "user", "content": "the quick"}]},
    COMPLETIONS: {"prompt": "the quick"},
    RESPONSES: {"input": "the quick"},
    "/tokenize": {},
    "/detokenize": {},
}
TOOL = {"type": "function", "function": {"name": "look"}}
UNKNOWN_TYPE = {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}
LONG = "word " * 2000
BOTH_KINDS: list[tuple[dict[str, Any], str]] = [
    ({"model": 5}, "model"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": 0.001}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-35}, "repetition_penalty"),
    ({"frequency_penalty": 3}, "frequency_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"seed": 1 << 63}, "seed"),
    ({"stop": 5}, "stop"),
    ({"n": 0}, "n"),
    ({"guided_regex": "[a"}, "guided_regex"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"type": "nothing"}}, "guided_json"),
    ({"guided_grammar": "start: ("}, "guided_grammar"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
    ({"deadline_ms": 0}, "deadline_ms"),
    ({"min_accuracy": 2}, "min_accuracy"),
    ({"min_accuracy": 0.95}, "min_accuracy"),
    ({"skip_level": 0.3, "min_accuracy": 0.85}, "min_accuracy"),
    ({"skip_level": 1}, "skip_level"),
    ({"skip_level": 0.25}, "skip_level"),
    ({"max_kl": -1}, "max_kl"),
    ({"max_kl": 0.1, "skip_level": 0.3}, "max_kl"),
]
EACH: list[tuple[str, dict[str, Any], str]] = [
    *((path, fields, param) for path in (CHATS, COMPLETIONS) for fields, param in BOTH_KINDS),
    (CHATS, {"messages": [{"role": "user", "content": ""}]}, "messages"),
    (CHATS, {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    (CHATS, {"messages": [{"role": "user", "content": "a" * 100_000}]}, "messages"),
    (CHATS, {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}, "messages"),
    (CHATS, {"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
    (CHATS, {"tools": [TOOL]}, "tools"),
    (CHATS, {"tool_choice": "required"}, "tool_choice"),
    (CHATS, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (CHATS, {"response_format": UNKNOWN_TYPE}, "response_format.json_schema"),
    (CHATS, {"response_format": {"type": "json_object"}, "guided_choice": ["b"]}, "response_format"),
    (COMPLETIONS, {"prompt": LONG}, "prompt"),
    (COMPLETIONS, {"prompt": "a" * 100_000}, "prompt"),
    (COMPLETIONS, {"prompt": [1 << 30]}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "prompt"),
    (COMPLETIONS, {"prompt": [1] * 500, "echo": True, "logprobs": 1}, "prompt"),
    (COMPLETIONS, {"suffix": "x"}, "suffix"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"ignore_eos": True, "guided_regex": "a"}, "ignore_eos"),
    (COMPLETIONS, {"echo": True, "logprobs": 1, "stop": "a"}, "echo"),
    (RESPONSES, {"input": ""}, "input"),
    (RESPONSES, {"input": LONG}, "input"),
    (RESPONSES, {"instructions": "a"}, "input"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content"),
    (RESPONSES, {"temperature": 0.001}, "temperature"),
    (RESPONSES, {"text": {"format": {"type": "json_schema"}}}, "text.format"),
    (RESPONSES, {"text": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}}, "text.format"),
    (RESPONSES, {"min_accuracy": 0.95}, "min_accuracy"),
    (RESPONSES, {"skip_level": 0.25}, "skip_level"),
    (RESPONSES, {"max_kl": 0.1, "skip_level": 0.3}, "max_kl"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a" * 100_000}, "prompt"),
    ("/tokenize", {"messages": [{"role": "user", "content": ""}]}, "messages"),
    ("/detokenize", {"tokens": [1 << 30]}, "tokens"),
]


@pytest.fixture
def service(tokenizer: PreTrainedTokenizerBase) -> Service:
    engine = tiny_engine(module=tiny_module(num_hidden_layers=10), tokenizer=tokenizer, max_seq_len=200)
    skipping = SkipPolicy(threshold=0.5, span=2, first_dense_layers=0, warmup_tokens=1, target_ratio=0.3)
    model = TextModel("tiny", engine, {0.0: DensePolicy(), 0.3: skipping}, exact_match)
    entries = (entry("text@0", 0.9, 100.0), replace(entry("text@0.3", 0.5, 60.0), kl=0.2))
    profile = Profile("tiny", model.fingerprint, model.device, model.dtype, entries)
    return Service(profile, model.format, Embedded(Runtime(profile, [EngineWorker(model)])))


def test_every_refusal_names_its_field(service: Service) -> None:
    """What is wrong is collected, so that one run shows the whole list."""
    pytest.importorskip("llguidance")

    async def exchange() -> list[str]:
        wrong = []
        async with client_of(service) as client:
            for path, fields, param in EACH:
                response = await client.post(path, json={"model": "tiny"} | MINIMAL[path] | fields)
                error = response.json().get("error", {})
                if (response.status_code, error.get("param")) != (400, param):
                    wrong.append(f"{path} {str(fields)[:60]}: {param}, got {response.status_code} {error}")
        return wrong

    wrong = asyncio.run(exchange())
    assert not wrong, "\n".join(wrong)
