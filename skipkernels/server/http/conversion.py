"""Turns the body of a request into a job. Runs in a thread, because decoding would block the event loop."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from skipkernels.chat.chat import Chat, ChatFormat, Message, Part, Role
from skipkernels.chat.grammar import ANY_OBJECT, GrammarText, KnownTokens, check_grammar
from skipkernels.chat.reply_parser import ReplyForm
from skipkernels.chat.text_format import TextFormat, allowed_new_tokens
from skipkernels.decoding.generation import SamplingParams
from skipkernels.errors import RequestError
from skipkernels.modality.job import Job, Request
from skipkernels.server.http.dialect import Dialect, Naming
from skipkernels.server.http.documents import ChatDocuments
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.limits import RequestLimits
from skipkernels.server.http.parts import PartDecoder
from skipkernels.server.http.responses import ResponseDocuments
from skipkernels.server.http.schema import (
    AnyPart,
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    DetokenizeRequest,
    FormatType,
    JsonSchema,
    ResponsesRequest,
    Sampled,
    TokenizeRequest,
    ToolChoice,
    unknown_fields,
)
from skipkernels.server.http.text_documents import Echo, TextDocuments

_LEAST_TEMPERATURE = 0.01  # below it, logits / temperature overflow
_MODALITIES = {"text": "text", "image_url": "image", "input_audio": "audio"}  # by type of part
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
_REFUSED_IN_RESPONSES = {
    "tools": "this server takes them in /v1/chat/completions",
    "previous_response_id": "answers are not kept; send the whole conversation as input",
    "conversation": "conversations are not kept; send all of it as input",
    "background": "answers are not kept; leave it out, and read this one as it comes",
}
_COMPLETION_TOKENS = 16
"""OpenAI's default of ``max_tokens`` for ``/v1/completions``."""

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True)
class ParsedRequest:
    """A request whose fields have all been checked, except against what only the scheduler knows."""

    job: Job
    stream: bool
    dialect: Dialect
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Converter:
    """Checks and decodes the bodies for one model.

    Args:
        naming: the only model that is served.
        strict: whether unknown fields are refused.
    """

    naming: Naming
    chat_format: ChatFormat
    limits: RequestLimits
    strict: bool = False

    def chat_completion(self, body: bytes) -> ParsedRequest:
        """
        Raises:
            RequestError, HttpError: the request is refused.
        """
        request, ignored = self._parse(ChatCompletionRequest, body)
        chat = self._chat(request)
        form = self.chat_format.reply_form(chat) if isinstance(self.chat_format, TextFormat) else ReplyForm()
        forced = _forced_call(request, form)
        if forced is not None:
            chat = replace(chat, grammar=forced)
        if chat.grammar is not None:
            check_grammar(chat.grammar)
        with _about("messages"):
            asked = self.chat_format.request(chat)
        dialect = ChatDocuments(
            self.naming,
            form,
            request.n or 1,
            logprobs=bool(request.logprobs),
            usage=_wants_usage(request),
            token_text=self._token_text,
        )
        job = _job(_repeated([asked], request.n or 1), request)
        return ParsedRequest(job, bool(request.stream), dialect, ignored)

    def completion(self, body: bytes) -> ParsedRequest:
        """As ``chat_completion``."""
        request, ignored = self._parse(CompletionRequest, body)
        text_format = self._text_format()
        if request.suffix:
            raise HttpError(400, "invalid_request", "this model cannot fill in before a suffix; leave it out", "suffix")
        if request.best_of not in (None, request.n or 1):
            raise HttpError(400, "invalid_request", "best_of must be n: every answer is given", "best_of")
        sampling = self._sampling(request, request.logprobs)
        grammar = _grammar(request)
        if grammar is not None:
            check_grammar(grammar)
        if grammar is not None and request.ignore_eos:
            message = "a grammar ends with the end of the sequence, which ignore_eos ignores; give one"
            raise HttpError(400, "invalid_request", message, "ignore_eos")
        eos = () if request.ignore_eos else None
        limit = _COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        asked, echoes = [], []
        for prompt in _prompts(request):
            with _about("prompt"):
                tokens = prompt if isinstance(prompt, list) else text_format.encode(prompt)
                text_format.check_tokens(tokens)
                allowed_new_tokens(limit, len(tokens), text_format.max_seq_len)
            if not tokens:
                raise HttpError(400, "invalid_request", "the prompt is empty", "prompt")
            told = bool(request.echo and request.logprobs is not None)
            if not told and limit == 0:
                raise HttpError(400, "invalid_request", "max_tokens 0 is for echo with logprobs only", "max_tokens")
            if told and (request.stop or grammar):
                raise HttpError(400, "invalid_request", "echo with logprobs takes neither stop nor a grammar", "echo")
            echoes.append(Echo(tuple(tokens), bool(request.echo), told, limit))
            if told:  # the prompt is generated as it stands, so that each token gets its log probability
                known = KnownTokens(tuple(tokens[1:]))
                new = max(1, len(tokens) - 1 + limit)
                asked.append(text_format.prompt_request(tokens[:1], new, sampling, grammar=known, eos_token_ids=()))
            else:
                stop = _stop(request)
                asked.append(
                    text_format.prompt_request(tokens, limit, sampling, stop=stop, grammar=grammar, eos_token_ids=eos)
                )
        dialect = TextDocuments(
            self.naming,
            [echo for echo in echoes for _ in range(request.n or 1)],
            logprobs=request.logprobs,
            usage=_wants_usage(request),
            token_text=self._token_text,
            prompt_text=text_format.text_of_prompt,
            eos=text_format.eos_token_ids,
        )
        job = _job(_repeated(asked, request.n or 1), request)
        return ParsedRequest(job, bool(request.stream), dialect, ignored)

    def response(self, body: bytes) -> ParsedRequest:
        """As ``chat_completion``."""
        request, ignored = self._parse(ResponsesRequest, body)
        for name, advice in _REFUSED_IN_RESPONSES.items():
            if getattr(request, name):
                raise HttpError(400, "invalid_request", f"{name}: {advice}", name)
        messages = [] if request.instructions is None else [Message("system", (request.instructions,))]
        if isinstance(request.input, str):
            messages.append(Message("user", (request.input,)))
        else:
            for number, message in enumerate(request.input):
                messages.append(Message(_ROLES[message.role], (_input_text(message.content, number),)))
        sampled = Sampled(model=request.model, temperature=request.temperature, top_p=request.top_p)
        wanted = request.text and request.text.format
        grammar = _format_grammar(wanted.type, wanted, "text.format") if wanted else None
        if grammar is not None:
            check_grammar(grammar)
        chat = Chat(
            tuple(messages),
            max_new_tokens=request.max_output_tokens,
            sampling=self._sampling(sampled, None),
            grammar=grammar,
        )
        with _about("input"):
            asked = self.chat_format.request(chat)
        form = self.chat_format.reply_form(chat) if isinstance(self.chat_format, TextFormat) else ReplyForm()
        job = _job([asked], request)
        return ParsedRequest(job, bool(request.stream), ResponseDocuments(self.naming, form), ignored)

    def tokenize(self, body: bytes) -> dict[str, Any]:
        """The answer of ``/tokenize``."""
        request, _ = self._parse(TokenizeRequest, body)
        text_format = self._text_format()
        if (request.prompt is None) == (request.messages is None):
            raise HttpError(400, "invalid_request", "give a prompt or messages, one of them", "prompt")
        if request.messages is not None:
            messages = decode_messages(request.messages, self.limits, text_format.modalities)
            with _about("messages"):
                tokens = list(text_format.request(Chat(messages)).inputs["text"].token_ids)
        else:
            with _about("prompt"):
                tokens = text_format.encode(request.prompt or "", add_special_tokens=request.add_special_tokens)
        return {"count": len(tokens), "max_model_len": text_format.max_seq_len, "tokens": tokens}

    def detokenize(self, body: bytes) -> dict[str, Any]:
        """The answer of ``/detokenize``."""
        request, _ = self._parse(DetokenizeRequest, body)
        text_format = self._text_format()
        with _about("tokens"):
            text_format.check_tokens(request.tokens)
        return {"prompt": text_format.decode(request.tokens)}

    def _parse(self, kind: type[Body], body: bytes) -> tuple[Body, tuple[str, ...]]:
        try:
            request = kind.model_validate_json(body)
        except ValidationError as error:
            raise HttpError.of_validation(error) from error
        name = getattr(request, "model", None)
        if name is not None:
            check_model(name, self.naming.model)
        ignored = tuple(unknown_fields(request))
        if ignored and self.strict:
            raise HttpError(400, "invalid_request", f"{ignored[0]}: this server knows no such field", ignored[0])
        return request, ignored

    def _sampling(self, request: Sampled, logprobs: int | None) -> SamplingParams:
        sampling = _sampling(request, logprobs)
        if isinstance(self.chat_format, TextFormat):
            with _about("logit_bias"):
                self.chat_format.check_tokens([token for token, _ in sampling.logit_bias])
        return sampling

    def _chat(self, request: ChatCompletionRequest) -> Chat:
        messages = decode_messages(request.messages, self.limits, self.chat_format.modalities)
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            message = "max_tokens is the older name of max_completion_tokens; give one"
            raise HttpError(400, "invalid_request", message, "max_tokens")
        if request.top_logprobs is not None and not request.logprobs:
            raise HttpError(400, "invalid_request", "top_logprobs are for logprobs: true only", "top_logprobs")
        if request.stream_options is not None and not request.stream:
            raise HttpError(400, "invalid_request", "stream_options are for stream: true only", "stream_options")
        tools = () if request.tool_choice == "none" else tuple(request.tools or ())
        return Chat(
            messages=messages,
            max_new_tokens=request.max_completion_tokens or request.max_tokens,
            sampling=self._sampling(request, (request.top_logprobs or 0) if request.logprobs else None),
            stop=_stop(request),
            grammar=_grammar(request),
            tools=tuple(tool.model_dump(exclude_none=True) for tool in tools),
            continues=_continues(request),
            template_options=request.chat_template_kwargs or {},
        )

    def _text_format(self) -> TextFormat:
        if not isinstance(self.chat_format, TextFormat):
            raise HttpError(400, "invalid_request", "this model takes chats only: use /v1/chat/completions")
        return self.chat_format

    def _token_text(self, token: int) -> str:
        return self._text_format().decode([token])


@contextmanager
def _about(field: str) -> Iterator[None]:
    """What the block refuses is about ``field``, unless the refusal knows better."""
    try:
        yield
    except RequestError as error:
        error.param = error.param or field
        raise


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
    media = sum(not isinstance(part, str) and part.type != "text" for _, part in given)
    if media > limits.max_parts:
        raise HttpError(413, "too_many_parts", f"{media} parts in all messages; a request may have {limits.max_parts}")
    for param, part in given:
        modality = "text" if isinstance(part, str) else _MODALITIES[part.type]
        if modality not in modalities:
            raise HttpError(
                400,
                "unknown_modality",
                f"this model does not take {modality}; it takes {', '.join(sorted(modalities))}",
                param,
            )
    for number, message in enumerate(messages):
        if message.content is None and not message.tool_calls:
            raise HttpError(
                400, "invalid_request", f"messages.{number}.content: Field required", f"messages.{number}.content"
            )
    decoder = PartDecoder(limits)
    return tuple(
        Message(
            _ROLES[message.role],
            tuple(_decode(part, param, decoder) for param, part in _parts([message], first=number)),
            _other_fields(message),
        )
        for number, message in enumerate(messages)
    )


def _other_fields(message: ChatMessage) -> dict[str, Any]:
    """What chat templates look at beside role and content. Templates want the arguments of calls as objects."""
    fields: dict[str, Any] = {}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return fields


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _parts(messages: list[ChatMessage], first: int = 0) -> Iterator[tuple[str, str | AnyPart]]:
    """Every part with its path in the request; a message of plain text is one part."""
    for number, message in enumerate(messages, first):
        if isinstance(message.content, str):
            yield f"messages.{number}.content", message.content
        else:
            for place, part in enumerate(message.content or ()):
                yield f"messages.{number}.content.{place}", part


def _decode(part: str | AnyPart, param: str, decoder: PartDecoder) -> Part:
    if isinstance(part, str):
        return part
    if part.type == "text":
        return part.text
    if part.type == "image_url":
        return decoder.image(part.image_url.url, f"{param}.image_url.url")
    return decoder.audio(part.input_audio.data, f"{param}.input_audio.data")


def _job(requests: Sequence[Request], request: Sampled | ResponsesRequest) -> Job:
    return Job(
        requests,
        deadline_ms=math.inf if request.deadline_ms is None else request.deadline_ms,
        min_accuracy=request.min_accuracy or 0.0,
        skip_level=request.skip_level,
        max_kl=request.max_kl,
    )


def _repeated(asked: Sequence[Request], n: int) -> list[Request]:
    """Each request ``n`` times, with a seed of its own; they share the prompt in the cache."""
    if n == 1:
        return list(asked)
    repeated = []
    for request in asked:
        prompt = request.inputs["text"]
        for number in range(n):
            seed = (prompt.sampling.seed + number) % (1 << 63)
            inputs = {**request.inputs, "text": replace(prompt, sampling=replace(prompt.sampling, seed=seed))}
            repeated.append(replace(request, inputs=inputs))
    return repeated


def _wants_usage(request: Sampled) -> bool:
    return request.stream_options is not None and request.stream_options.include_usage


def _stop(request: Sampled) -> tuple[str, ...]:
    return (request.stop,) if request.stop and isinstance(request.stop, str) else tuple(request.stop or ())


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [prompt]
    if not prompt:
        raise HttpError(400, "invalid_request", "the prompt is empty", "prompt")
    return list(prompt)  # type: ignore[arg-type]


def _input_text(content: str | list[dict[str, Any]], number: int) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.get("type") not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            message = f"/v1/responses takes text only, got a part of type {part.get('type')!r}"
            raise HttpError(400, "invalid_request", message, f"input.{number}.content")
        texts.append(part["text"])
    return "".join(texts)


def _continues(request: ChatCompletionRequest) -> bool:
    """Whether the last message, an assistant's, is to be gone on with."""
    last = request.messages[-1]
    asked = request.continue_final_message
    if asked and last.role != "assistant":
        message = "continue_final_message needs an assistant's message at the end"
        raise HttpError(400, "invalid_request", message, "continue_final_message")
    return bool(asked) or (asked is None and last.role == "assistant" and not last.tool_calls)


def _format_grammar(kind: FormatType, schema: JsonSchema | None, field: str) -> GrammarText | None:
    """The grammar of what chats call ``response_format`` and responses ``text.format``; None: any text will do."""
    if kind == "text":
        return None
    if kind == "json_object":
        return GrammarText("json_schema", ANY_OBJECT, field)
    if schema is None or schema.schema_ is None:
        raise HttpError(400, "invalid_request", f"{field}: json_schema needs a schema", field)
    return GrammarText("json_schema", json.dumps(schema.schema_), field)


def _grammar(request: Sampled) -> GrammarText | None:
    """The one thing that the answer has to follow."""
    found: list[GrammarText] = []
    if isinstance(request, ChatCompletionRequest) and (wanted := request.response_format) is not None:
        formatted = _format_grammar(wanted.type, wanted.json_schema, "response_format.json_schema")
        if formatted is not None:
            found.append(formatted)
    if request.guided_json is not None:
        schema = request.guided_json if isinstance(request.guided_json, str) else json.dumps(request.guided_json)
        found.append(GrammarText("json_schema", schema, "guided_json"))
    if request.guided_regex is not None:
        found.append(GrammarText("regex", request.guided_regex, "guided_regex"))
    if request.guided_grammar is not None:
        found.append(GrammarText("lark", request.guided_grammar, "guided_grammar"))
    if request.guided_choice is not None:
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in request.guided_choice)
        found.append(GrammarText("lark", f"start: {choices}", "guided_choice"))
    if len(found) > 1:
        names = [str(one.param).partition(".")[0] for one in found]
        message = f"{' and '.join(names)} are both what the answer has to follow; give one"
        raise HttpError(400, "invalid_request", message, names[0])
    return found[0] if found else None


def _forced_call(request: ChatCompletionRequest, form: ReplyForm) -> GrammarText | None:
    """The grammar of a call that ``tool_choice`` demands."""
    choice, tools = request.tool_choice, request.tools or []
    if choice in (None, "none", "auto"):
        return None
    wanted = [
        tool.function
        for tool in tools
        if not isinstance(choice, ToolChoice) or tool.function.name == choice.function.name
    ]
    if not wanted:
        raise HttpError(400, "invalid_request", "tool_choice names no tool of this request", "tool_choice")
    if _grammar(request) is not None:
        message = "a demanded tool and a format of the answer exclude each other; give one"
        raise HttpError(400, "invalid_request", message, "tool_choice")
    key = "arguments" if form.tools == "hermes" else "parameters"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, key: function.parameters or {"type": "object"}},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for function in wanted
    ]
    schema = json.dumps(calls[0] if len(calls) == 1 else {"anyOf": calls})
    if form.tools != "hermes":
        return GrammarText("json_schema", schema, "tools")
    return GrammarText("lark", f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {schema}', "tools")


def _sampling(request: Sampled, logprobs: int | None) -> SamplingParams:
    temperature = request.temperature or 0.0
    if 0.0 < temperature < _LEAST_TEMPERATURE:
        message = f"temperature must be 0 (greedy) or at least {_LEAST_TEMPERATURE}, got {temperature}"
        raise RequestError(message, param="temperature")
    return SamplingParams(
        temperature=temperature,
        top_k=max(0, request.top_k or 0),
        top_p=request.top_p or 1.0,
        min_p=request.min_p or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        logit_bias=_bias(request),
        logprobs=logprobs,
        # drawn here, so that an answer that is restarted on another worker is the same
        seed=request.seed if request.seed is not None else secrets.randbits(63),
    )


def _bias(request: Sampled) -> tuple[tuple[int, float], ...]:
    wrong = [token for token in request.logit_bias or {} if not token.isascii() or not token.isdecimal()]
    if wrong:
        message = f"logit_bias: keys are token ids, got {wrong[0][:20]!r}"
        raise HttpError(400, "invalid_request", message, "logit_bias")
    return tuple((int(token), bias) for token, bias in (request.logit_bias or {}).items() if bias)
