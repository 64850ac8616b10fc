"""The JSON of chat completions: OpenAI's fields, and an object ``skipkernels`` for everything else."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from skipkernels.chat.chat import ChatFormat, Completion
from skipkernels.chat.progress import Piece, SampledToken
from skipkernels.chat.reply_parser import Called, ReplyForm, ReplyParser, ReplyPart, Said, Thought
from skipkernels.modality.job import JobAnswer
from skipkernels.modality.profile import Profile
from skipkernels.server.http.dialect import DONE, Naming, completions_of, joined, rest_of, strategy_of, usage_of


class ChatDocuments:
    """A ``Dialect``.

    Args:
        form: how the model writes.
        n: answers.
        usage: whether a stream ends with the counts of tokens.
        token_text: of one token.
    """

    last_event = DONE

    def __init__(
        self,
        naming: Naming,
        form: ReplyForm,
        n: int,
        *,
        logprobs: bool,
        usage: bool,
        token_text: Callable[[int], str],
    ) -> None:
        self._naming = naming
        self._form = form
        self._logprobs = logprobs
        self._usage = usage
        self._token_text = token_text
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._sent = [""] * n
        self._parsers = [ReplyParser(form) for _ in range(n)]
        self._calls = [0] * n

    def whole(self, answer: JobAnswer) -> dict[str, Any]:
        choices = [self._choice(index, completion) for index, completion in enumerate(completions_of(answer))]
        return self._head("chat.completion") | {
            "choices": choices,
            "usage": usage_of(answer),
            "skipkernels": strategy_of(answer),
        }

    def begin(self) -> list[dict[str, Any]]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self._sent))]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        self._sent[piece.index] += piece.text
        return self._deltas(piece.index, self._parsers[piece.index].feed(piece.text), piece.logprobs)

    def end(self, answer: JobAnswer) -> list[dict[str, Any]]:
        documents = []
        for index, completion in enumerate(completions_of(answer)):
            parser = self._parsers[index]
            parts = [*parser.feed(rest_of(completion, self._sent[index])), *parser.end()]
            documents += self._deltas(index, parts, ())
            documents.append(self._chunk(index, {}, "tool_calls" if self._calls[index] else completion.finish_reason))
        documents[-1]["skipkernels"] = strategy_of(answer)
        if self._usage:
            documents.append(self._head("chat.completion.chunk") | {"choices": [], "usage": usage_of(answer)})
        return documents

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        parser = ReplyParser(self._form)
        parts = [*parser.feed(completion.text), *parser.end()]
        calls = [part for part in parts if isinstance(part, Called)]
        said = "".join(part.text for part in parts if isinstance(part, Said))
        message: dict[str, Any] = {"role": "assistant", "content": (said or None) if calls else said, "refusal": None}
        if thought := joined([part.text for part in parts if isinstance(part, Thought)]):
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        told = None
        if self._logprobs and completion.logprobs is not None:
            told = self._told(list(zip(completion.token_ids, completion.logprobs, strict=True)))
        return {
            "index": index,
            "message": message,
            "finish_reason": "tool_calls" if calls else completion.finish_reason,
            "logprobs": told,
        }

    def _deltas(self, index: int, parts: Sequence[ReplyPart], logprobs: Sequence[SampledToken]) -> list[dict[str, Any]]:
        documents = []
        for part in parts:
            if isinstance(part, Called):
                delta: dict[str, Any] = {"tool_calls": [{"index": self._calls[index], **_call(part)}]}
                self._calls[index] += 1
            else:
                delta = {"content" if isinstance(part, Said) else "reasoning_content": part.text}
            documents.append(self._chunk(index, delta))
        if self._logprobs and logprobs:
            if not documents:
                documents.append(self._chunk(index, {"content": ""}))
            documents[-1]["choices"][0]["logprobs"] = self._told(logprobs)
        return documents

    def _told(self, tokens: Sequence[SampledToken]) -> dict[str, Any]:
        content = []
        for token, own in tokens:
            top = [self._token(other, logprob) for other, logprob in own.top]
            content.append(self._token(token, own.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._naming.model,
            "system_fingerprint": self._naming.fingerprint,
        }


def _call(call: Called) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def model_document(profile: Profile, chat_format: ChatFormat, created: int) -> dict[str, Any]:
    """An entry of ``/v1/models``."""
    return {
        "id": profile.model,
        "object": "model",
        "created": created,
        "owned_by": "skipkernels",
        "skipkernels": {
            "modalities": list(chat_format.modalities),
            "chat_template": chat_format.has_template,
            "device": profile.device,
            "dtype": profile.dtype,
            "profile": profile.source,
            "profiling": profile.measuring,
            "best_promised_accuracy": max(entry.promised_accuracy for entry in profile.strategies),
            "strategies": [
                {
                    "strategy": entry.strategy.name,
                    "skip_level": entry.strategy.skip_level,
                    "measured_kl": profile.kl_of(entry),
                    "promised_accuracy": entry.promised_accuracy,
                    "median_ms": entry.median_ms(1),
                    "offered_at": list(profile.offered_at(entry)),
                }
                for entry in profile.strategies
            ],
        },
    }
