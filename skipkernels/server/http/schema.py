"""Request bodies: OpenAI's fields, where values that change nothing are always accepted. Other fields are ignored, and
named in the answer's header ``x-skipkernels-ignored``; with ``--strict`` they are refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

MOST_ITEMS = 1024
"""Items in an array: bounds the objects that are built before ``RequestLimits.max_parts`` is checked."""

Text = Annotated[str, Field(max_length=1 << 22)]


class Strict(BaseModel):
    """Values of other types are refused, and so are numbers that are not finite and unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Lenient(BaseModel):
    """As ``Strict``, but unknown fields are kept, for ``unknown_fields`` to find."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def unknown_fields(value: object, path: str = "") -> Iterator[str]:
    """Paths of the fields of a body that mean nothing here; those that are null are as good as absent."""
    if isinstance(value, BaseModel):
        for name, extra in (value.model_extra or {}).items():
            if extra is not None:
                yield f"{path}{name}"
        for name in type(value).model_fields:
            yield from unknown_fields(getattr(value, name), f"{path}{name}.")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown_fields(item, f"{path}{number}.")


class TextPart(Lenient):
    type: Literal["text"]
    text: Text


class ImageUrl(Lenient):
    url: str
    detail: Literal["auto", "high"] = "auto"


class ImagePart(Lenient):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Lenient):
    data: str
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(Lenient):
    type: Literal["input_audio"]
    input_audio: InputAudio


def _tag_of_part(part: object) -> str | None:
    return f"({part.get('type')})" if isinstance(part, dict) else None


def _tag_of_text(value: object) -> str | None:
    return "(text)" if isinstance(value, str) else "(list)" if isinstance(value, list) else None


def _text_or_list(field: str, items: str) -> Discriminator:
    """Of a union of a text and a list, which are tagged so; other values are refused in one sentence."""
    message = f"{field} must be a text or an array of {items}"
    return Discriminator(_tag_of_text, custom_error_type=field, custom_error_message=message)


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


class FunctionCall(Lenient):
    name: str
    arguments: str


class ToolCall(Lenient):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


Content = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[AnyPart], Field(min_length=1, max_length=MOST_ITEMS), Tag("(list)")],
    _text_or_list("content", "parts"),
]


class ChatMessage(Lenient):
    """``content`` may be null beside ``tool_calls`` only."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


StopText = Annotated[str, Field(min_length=1, max_length=256)]
# an empty text is none: clients send it as such
Stop = Annotated[
    Annotated[str, Field(max_length=256), Tag("(text)")]
    | Annotated[list[StopText], Field(max_length=16), Tag("(list)")],
    _text_or_list("stop", "texts"),
]


class StreamOptions(Lenient):
    include_usage: bool = False


class JsonSchema(Lenient):
    name: str = "answer"
    # an alias: BaseModel has a method of this name
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


FormatType = Literal["text", "json_object", "json_schema"]


class ResponseFormat(Lenient):
    type: FormatType
    json_schema: JsonSchema | None = None


class Function(Lenient):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    type: Literal["function"]
    function: Function


class FunctionName(Lenient):
    name: str


class ToolChoice(Lenient):
    type: Literal["function"]
    function: FunctionName


class Generating(Lenient):
    """What every request for an answer may say: OpenAI's fields, and this project's ``deadline_ms``, ``min_accuracy``,
    ``skip_level`` and ``max_kl``. Decoding is greedy unless a temperature is given; accuracies are promised for greedy
    decoding."""

    model: str
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    deadline_ms: float | None = Field(default=None, gt=0.0, le=1e9)
    min_accuracy: float | None = Field(default=None, ge=0.0, le=1.0)
    skip_level: float | None = Field(default=None, ge=0.0, lt=1.0)
    max_kl: float | None = Field(default=None, ge=0.0)


class Sampled(Generating):
    """What chats and completions may say: more of OpenAI's fields, and vLLM's ``top_k``, ``min_p``,
    ``repetition_penalty`` and ``guided_*``."""

    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=0)
    top_k: int | None = Field(default=None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, gt=0.0, le=2.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = Field(default=None, max_length=1024)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop | None = None
    n: int | None = Field(default=None, ge=1, le=16)
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = Field(default=None, min_length=1, max_length=256)


class ChatCompletionRequest(Sampled):
    """``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_ITEMS)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


Tokens = Annotated[list[int], Field(max_length=1 << 20)]


def _tag_of_prompt(value: object) -> str | None:
    if not isinstance(value, list):
        return _tag_of_text(value)
    first = value[0] if value else None
    return "(texts)" if isinstance(first, str) else "(lists)" if isinstance(first, list) else "(tokens)"


AnyPrompt = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[Text], Field(max_length=128), Tag("(texts)")]
    | Annotated[Tokens, Tag("(tokens)")]
    | Annotated[list[Tokens], Field(max_length=128), Tag("(lists)")],
    Discriminator(
        _tag_of_prompt,
        custom_error_type="prompt",
        custom_error_message="prompt must be a text, token ids, or an array of either",
    ),
]


class CompletionRequest(Sampled):
    """``/v1/completions``. With ``ignore_eos``, as vLLM and llama.cpp have it, answers are ``max_tokens`` long,
    unless a stop string ends them."""

    prompt: AnyPrompt
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = Field(default=None, ge=1)
    ignore_eos: bool | None = None
    suffix: str | None = None


class InputMessage(Lenient):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[dict[str, Any]]
    type: Literal["message"] = "message"


class Reasoning(Lenient):
    effort: str | None = None


class AnswerFormat(JsonSchema):
    type: FormatType


class TextOptions(Lenient):
    format: AnswerFormat | None = None


Input = Annotated[
    Annotated[Text, Tag("(text)")]
    | Annotated[list[InputMessage], Field(min_length=1, max_length=MOST_ITEMS), Tag("(list)")],
    _text_or_list("input", "messages"),
]


class ResponsesRequest(Generating):
    """``/v1/responses``: text, whole or streamed. ``tools`` and what would need kept answers are refused."""

    input: Input
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    text: TextOptions | None = None
    tools: list[dict[str, Any]] | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None


class TokenizeRequest(Lenient):
    """``/tokenize``: of a prompt, or of a chat with its template."""

    model: str | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1, max_length=MOST_ITEMS)
    add_special_tokens: bool = True


class DetokenizeRequest(Lenient):
    """``/detokenize``."""

    model: str | None = None
    tokens: Tokens
