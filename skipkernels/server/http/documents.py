"""The JSON of answers: OpenAI's fields, and an object ``skipkernels`` for everything else."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from skipkernels.chat.chat import Completion
from skipkernels.modality.job import JobAnswer
from skipkernels.modality.profile import Profile
from skipkernels.server.http.pending_request import completion_of

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Documents:
    """Makes the JSON documents of one request."""

    model: str
    fingerprint: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, job_answer: JobAnswer) -> dict[str, Any]:
        """The answer without streaming."""
        _, completion = completion_of(job_answer)
        message = {"role": "assistant", "content": completion.text}
        choice = {"index": 0, "message": message, "finish_reason": completion.finish_reason, "logprobs": None}
        return self._head("chat.completion") | {
            "choices": [choice],
            "usage": _usage(completion),
            "skipkernels": _strategy(job_answer),
        }

    def first(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""}, None)

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text}, None)

    def last(self, job_answer: JobAnswer) -> dict[str, Any]:
        """The last chunk of the answer."""
        _, completion = completion_of(job_answer)
        return self._chunk({}, completion.finish_reason) | {"skipkernels": _strategy(job_answer)}

    def usage(self, job_answer: JobAnswer) -> dict[str, Any]:
        """The chunk after the last, for ``stream_options.include_usage``."""
        _, completion = completion_of(job_answer)
        return self._head("chat.completion.chunk") | {"choices": [], "usage": _usage(completion)}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._head("chat.completion.chunk") | {"choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def model_document(profile: Profile, modalities: tuple[str, ...], created: int) -> dict[str, Any]:
    """An entry of ``/v1/models``."""
    return {
        "id": profile.model,
        "object": "model",
        "created": created,
        "owned_by": "skipkernels",
        "skipkernels": {
            "modalities": list(modalities),
            "device": profile.device,
            "dtype": profile.dtype,
            "profile": profile.source,
            "best_promised_accuracy": max(entry.promised_accuracy for entry in profile.strategies),
            "strategies": [
                {
                    "strategy": entry.strategy.name,
                    "promised_accuracy": entry.promised_accuracy,
                    "median_ms": entry.median_ms(1),
                }
                for entry in profile.strategies
            ],
        },
    }


def _usage(completion: Completion) -> dict[str, int]:
    return {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.new_tokens,
        "total_tokens": completion.total_tokens,
    }


def _strategy(job_answer: JobAnswer) -> dict[str, Any]:
    """How the request was answered; ``time_ms`` counts from the moment the scheduler accepted it."""
    answer, completion = completion_of(job_answer)
    return {
        "strategy": answer.strategy.name,
        "promised_accuracy": answer.promised_accuracy,
        "time_ms": answer.time_ms,
        "deadline_met": job_answer.deadline_met,
        "retried": answer.retried,
        "skip_ratio": completion.skip_ratio,
    }
