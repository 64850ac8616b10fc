"""The documents of one request's answer, whatever its interface: chat completions, completions or responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from skipkernels.chat.chat import Completion
from skipkernels.chat.progress import Piece
from skipkernels.modality.errors import JobFailed
from skipkernels.modality.job import JobAnswer

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Naming:
    """What is served."""

    model: str
    fingerprint: str


class Dialect(Protocol):
    """Makes JSON documents; those of a stream are events."""

    last_event: bytes
    """What ends a stream."""

    def whole(self, answer: JobAnswer) -> dict[str, Any]:
        """The answer without streaming."""
        ...

    def begin(self) -> list[dict[str, Any]]: ...

    def piece(self, piece: Piece) -> list[dict[str, Any]]: ...

    def end(self, answer: JobAnswer) -> list[dict[str, Any]]:
        """After the last piece."""
        ...


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event; named where the document has a type, as those of responses do."""
    name = f"event: {document['type']}\n".encode() if "type" in document else b""
    return name + b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def completions_of(answer: JobAnswer) -> list[Completion]:
    """The model's outputs, in the order of the job's requests."""
    for one in answer.answers:
        assert isinstance(one.output, Completion), f"a ChatModel puts out Completion objects, got {type(one.output)}"
    return [one.output for one in answer.answers]


def usage_of(answer: JobAnswer, prompts: int = 1) -> dict[str, int]:
    """``prompts``: each of them counts once, however many answers it has."""
    completions = completions_of(answer)
    each = len(completions) // prompts
    prompt_tokens = sum(completion.prompt_tokens for completion in completions[::each])
    new_tokens = sum(completion.new_tokens for completion in completions)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def strategy_of(job_answer: JobAnswer) -> dict[str, Any]:
    """How the request was answered; times count from the moment the scheduler accepted it."""
    first, completions = job_answer.answers[0], completions_of(job_answer)
    gaps = sorted(gap for completion in completions for gap in completion.gaps_ms)
    new_tokens = sum(completion.new_tokens for completion in completions)
    skipped = sum(completion.skip_ratio * completion.new_tokens for completion in completions)
    document: dict[str, Any] = {
        "strategy": "+".join(dict.fromkeys(answer.strategy.name for answer in job_answer.answers)),
        "promised_accuracy": job_answer.promised_accuracy,
        "measured_kl": _worst([answer.kl for answer in job_answer.answers]),
        "time_ms": job_answer.time_ms,
        "deadline_met": job_answer.deadline_met,
        "retried": any(answer.retried for answer in job_answer.answers),
        "skip_ratio": skipped / new_tokens if new_tokens else 0.0,
        "bytes_not_read": sum(completion.bytes_not_read for completion in completions),
    }
    if completions[0].after_first_ms is not None:
        document["time_to_first_token_ms"] = max(0.0, first.time_ms - completions[0].after_first_ms)
    if gaps:
        document["gap_ms"] = {"median": gaps[len(gaps) // 2], "max": gaps[-1]}
    return document


def _worst(divergences: Sequence[float | None]) -> float | None:
    """None where one of them was not measured."""
    known = [kl for kl in divergences if kl is not None]
    return max(known) if len(known) == len(divergences) else None


def rest_of(completion: Completion, sent: str) -> str:
    """The text that remains to be sent after ``sent``.

    Raises:
        JobFailed: ``sent`` is not a prefix of the answer, because a retry gave a different one.
    """
    if not completion.text.startswith(sent):
        raise JobFailed(
            "a worker was lost after a part of this answer was sent, and the retry on another gave a different answer; "
            "send the request again"
        )
    return completion.text[len(sent) :]


def joined(parts: Sequence[str]) -> str | None:
    return "".join(parts) or None
