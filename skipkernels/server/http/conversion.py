"""Turns the body of a request into a job. Runs in a thread, because decoding would block the event loop."""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from skipkernels.chat.chat import Chat, ChatFormat, Message, Part, Role
from skipkernels.decoding.generation import SamplingParams
from skipkernels.modality.errors import JobError
from skipkernels.modality.job import Job
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.limits import RequestLimits
from skipkernels.server.http.parts import PartDecoder
from skipkernels.server.http.schema import AnyPart, ChatCompletionRequest, ChatMessage

_LEAST_TEMPERATURE = 0.01  # below it, logits / temperature overflow
_MODALITIES = {"text": "text", "image_url": "image", "input_audio": "audio"}  # by type of part
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class ParsedRequest:
    """A request whose fields have all been checked, except against what only the scheduler knows."""

    job: Job
    stream: bool
    include_usage: bool


def convert(body: bytes, model: str, chat_format: ChatFormat, limits: RequestLimits) -> ParsedRequest:
    """
    Args:
        model: the only name that is served.

    Raises:
        RequestError, HttpError: the request is refused.
    """
    try:
        request = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise HttpError.of_validation(error) from error
    check_model(request.model, model)
    if request.stream_options is not None and not request.stream:
        raise HttpError(400, "invalid_request", "stream_options are for stream: true only", "stream_options")
    job = Job(
        [chat_format.request(_chat(request, chat_format, limits))],
        deadline_ms=math.inf if request.deadline_ms is None else request.deadline_ms,
        min_accuracy=request.min_accuracy or 0.0,
    )
    include_usage = request.stream_options is not None and request.stream_options.include_usage
    return ParsedRequest(job, request.stream, include_usage)


def check_model(name: str, model: str) -> None:
    """Raises HttpError when ``name`` is not that of the only model that is served."""
    if name != model:
        raise HttpError(404, "model_not_found", f"model {name[:80]!r} is not served; {model!r} is", "model")


def decode_messages(
    messages: list[ChatMessage], limits: RequestLimits, modalities: Collection[str] = tuple(_MODALITIES.values())
) -> tuple[Message, ...]:
    """Decodes the images and recordings of messages.

    Args:
        limits: they hold for all messages together.
        modalities: what the messages may hold.

    Raises:
        HttpError: too much, another modality, or undecodable.
    """
    given = list(_parts(messages))
    if len(given) > limits.max_parts:
        raise HttpError(
            413, "too_many_parts", f"{len(given)} parts in all messages; a request may have {limits.max_parts}"
        )
    for param, part in given:
        modality = "text" if isinstance(part, str) else _MODALITIES[part.type]
        if modality not in modalities:
            raise HttpError(
                400,
                "unknown_modality",
                f"this model does not take {modality}; it takes {', '.join(sorted(modalities))}",
                param,
            )
    decoder = PartDecoder(limits)
    return tuple(
        Message(
            _ROLES[message.role],
            tuple(_decode(part, param, decoder) for param, part in _parts([message], first=number)),
        )
        for number, message in enumerate(messages)
    )


def _chat(request: ChatCompletionRequest, chat_format: ChatFormat, limits: RequestLimits) -> Chat:
    messages = decode_messages(request.messages, limits, chat_format.modalities)
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise HttpError(400, "invalid_request", "max_tokens is the older name of max_completion_tokens; give one")
    return Chat(
        messages=messages,
        max_new_tokens=request.max_completion_tokens or request.max_tokens,
        sampling=_sampling(request),
        stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
    )


def _parts(messages: list[ChatMessage], first: int = 0) -> Iterator[tuple[str, str | AnyPart]]:
    """Every part with its path in the request; a message of plain text is one part."""
    for number, message in enumerate(messages, first):
        if isinstance(message.content, str):
            yield f"messages.{number}.content", message.content
        else:
            for place, part in enumerate(message.content):
                yield f"messages.{number}.content.{place}", part


def _decode(part: str | AnyPart, param: str, decoder: PartDecoder) -> Part:
    if isinstance(part, str):
        return part
    if part.type == "text":
        return part.text
    if part.type == "image_url":
        return decoder.image(part.image_url.url, f"{param}.image_url.url")
    return decoder.audio(part.input_audio.data, f"{param}.input_audio.data")


def _sampling(request: ChatCompletionRequest) -> SamplingParams:
    temperature = request.temperature or 0.0
    if 0.0 < temperature < _LEAST_TEMPERATURE:
        raise JobError(f"temperature must be 0 (greedy) or at least {_LEAST_TEMPERATURE}, got {temperature}")
    return SamplingParams(
        temperature=temperature,
        top_k=max(0, request.top_k or 0),
        top_p=request.top_p or 1.0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        # drawn here, so that an answer that is restarted on another worker is the same
        seed=request.seed if request.seed is not None else secrets.randbits(63),
    )
