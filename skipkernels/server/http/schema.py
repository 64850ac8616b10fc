"""The request body of a chat completion: the fields of OpenAI's that are supported. Others are refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MOST_ITEMS = 1024
"""Items in an array: bounds the objects that are built before ``RequestLimits.max_parts`` is checked."""

Text = Annotated[str, Field(max_length=1 << 22)]


class Strict(BaseModel):
    """Unknown fields are refused, and so are values of other types and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "high"] = "auto"


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Strict):
    data: str
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


def _tag_of_part(part: object) -> str | None:
    return f"({part.get('type')})" if isinstance(part, dict) else None


def _tag_of_text(value: object) -> str | None:
    return "(text)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


# tags are in parentheses, so that errors can tell them from field names
AnyPart = Annotated[
    Annotated[TextPart, Tag("(text)")]
    | Annotated[ImagePart, Tag("(image_url)")]
    | Annotated[AudioPart, Tag("(input_audio)")],
    Discriminator(
        _tag_of_part,
        custom_error_type="part",
        custom_error_message="a part must be an object whose type is text, image_url or input_audio",
    ),
]


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("(text)")]
        | Annotated[list[AnyPart], Field(min_length=1, max_length=MOST_ITEMS), Tag("(list)")],
        Discriminator(
            _tag_of_text,
            custom_error_type="content",
            custom_error_message="content must be a text or an array of parts",
        ),
    ]


StopText = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(Strict):
    include_usage: bool = False


class ChatCompletionRequest(Strict):
    """OpenAI's fields; vLLM's ``top_k``, ``min_p``, ``repetition_penalty``; this project's ``deadline_ms``,
    ``min_accuracy``. Decoding is greedy unless a temperature is given; accuracies are promised for greedy decoding."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_ITEMS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=2.0)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: (
        Annotated[
            Annotated[StopText, Tag("(text)")] | Annotated[list[StopText], Field(max_length=4), Tag("(list)")],
            Discriminator(
                _tag_of_text, custom_error_type="stop", custom_error_message="stop must be a text or an array of texts"
            ),
        ]
        | None
    ) = None
    n: int | None = Field(default=None, ge=1, le=1)
    frequency_penalty: float | None = Field(default=None, ge=0.0, le=0.0)
    presence_penalty: float | None = Field(default=None, ge=0.0, le=0.0)
    user: str | None = None
    deadline_ms: float | None = Field(default=None, gt=0.0)
    min_accuracy: float | None = Field(default=None, ge=0.0, le=1.0)
