"""From the body of a request to the job that it stands for. Runs beside the event loop: decoding takes time."""

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
from skipkernels.server.http.limits import Limits
from skipkernels.server.http.parts import PartDecoder
from skipkernels.server.http.schema import AnyPart, ChatCompletionRequest, ChatMessage

_LEAST_TEMPERATURE = 0.01  # below, logits over temperature leave the range of numbers
_MODALITIES = {"text": "text", "image_url": "image", "input_audio": "audio"}  # by type of part
_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Asked:
    """A request whose every field was checked, but for what only the scheduler knows."""

    job: Job
    stream: bool
    include_usage: bool


def convert(body: bytes, model: str, chat_format: ChatFormat, limits: Limits) -> Asked:
    """
    Args:
        model: the only name that is served.

    Raises:
        RequestError, HttpError: the request is refused.
    """
    try:
        asked = ChatCompletionRequest.model_validate_json(body)
    except ValidationError as error:
        raise HttpError.of_validation(error) from error
    check_model(asked.model, model)
    if asked.stream_options is not None and not asked.stream:
        raise HttpError(400, "invalid_request", "stream_options are for stream: true only", "stream_options")
    request = chat_format.request(_chat(asked, chat_format, limits))
    job = Job(
        [request],
        deadline_ms=math.inf if asked.deadline_ms is None else asked.deadline_ms,
        min_accuracy=asked.min_accuracy or 0.0,
    )
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    return Asked(job, asked.stream, include_usage)


def check_model(asked: str, model: str) -> None:
    """Raises HttpError when another model is asked for than the only one that is served."""
    if asked != model:
        raise HttpError(404, "model_not_found", f"model {asked[:80]!r} is not served; {model!r} is", "model")


def decode_messages(
    messages: list[ChatMessage], limits: Limits, modalities: Collection[str] = tuple(_MODALITIES.values())
) -> tuple[Message, ...]:
    """Images and recordings out of their texts.

    Args:
        limits: for all messages together.
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


def _chat(asked: ChatCompletionRequest, chat_format: ChatFormat, limits: Limits) -> Chat:
    messages = decode_messages(asked.messages, limits, chat_format.modalities)
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise HttpError(400, "invalid_request", "max_tokens is the older name of max_completion_tokens; give one")
    return Chat(
        messages=messages,
        max_new_tokens=asked.max_completion_tokens or asked.max_tokens,
        sampling=_sampling(asked),
        stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
    )


def _parts(messages: list[ChatMessage], first: int = 0) -> Iterator[tuple[str, str | AnyPart]]:
    """Every part and where it stands; a message of plain text is one part."""
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


def _sampling(asked: ChatCompletionRequest) -> SamplingParams:
    temperature = asked.temperature or 0.0
    if 0.0 < temperature < _LEAST_TEMPERATURE:
        raise JobError(f"temperature must be 0 (greedy) or at least {_LEAST_TEMPERATURE}, got {temperature}")
    return SamplingParams(
        temperature=temperature,
        top_k=max(0, asked.top_k or 0),
        top_p=asked.top_p or 1.0,
        min_p=asked.min_p or 0.0,
        repetition_penalty=asked.repetition_penalty or 1.0,
        # drawn here: an answer that begins again on another worker has to be the same
        seed=asked.seed if asked.seed is not None else secrets.randbits(63),
    )
