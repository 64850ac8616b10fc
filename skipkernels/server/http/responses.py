"""The JSON of ``/v1/responses``, as far as a chat's text covers it."""

from __future__ import annotations

import time
import uuid
from typing import Any

from skipkernels.chat.progress import Piece
from skipkernels.chat.reply_parser import ReplyForm, ReplyParser, ReplyPart, Said
from skipkernels.modality.job import JobAnswer
from skipkernels.server.http.dialect import Naming, completions_of, rest_of, strategy_of, usage_of


class ResponseDocuments:
    """A ``Dialect``; every event has a type and a number. Thoughts are left out."""

    last_event = b""

    def __init__(self, naming: Naming, form: ReplyForm) -> None:
        self._naming = naming
        self._form = form
        self._id = f"resp_{uuid.uuid4().hex}"
        self._item = f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._parser = ReplyParser(form)
        self._sent = ""
        self._said = ""
        self._events = 0

    def whole(self, answer: JobAnswer) -> dict[str, Any]:
        (completion,) = completions_of(answer)
        parser = ReplyParser(self._form)
        said = "".join(part.text for part in [*parser.feed(completion.text), *parser.end()] if isinstance(part, Said))
        counts = usage_of(answer)
        complete = completion.finish_reason == "stop"
        status = "completed" if complete else "incomplete"
        return self._response(status, [self._message(said, status)]) | {
            "incomplete_details": None if complete else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
            "skipkernels": strategy_of(answer),
        }

    def begin(self) -> list[dict[str, Any]]:
        return [
            self._event("response.created", response=self._response("in_progress", [])),
            self._event("response.in_progress", response=self._response("in_progress", [])),
            self._event("response.output_item.added", output_index=0, item=self._message(None, "in_progress")),
            self._event("response.content_part.added", **self._place(), part=_text("")),
        ]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        self._sent += piece.text
        return self._deltas(self._parser.feed(piece.text))

    def end(self, answer: JobAnswer) -> list[dict[str, Any]]:
        (completion,) = completions_of(answer)
        documents = self._deltas([*self._parser.feed(rest_of(completion, self._sent)), *self._parser.end()])
        response = self.whole(answer)
        message = self._message(self._said, response["status"])
        response["output"] = [message]
        return [
            *documents,
            self._event("response.output_text.done", **self._place(), text=self._said, logprobs=[]),
            self._event("response.content_part.done", **self._place(), part=_text(self._said)),
            self._event("response.output_item.done", output_index=0, item=message),
            self._event(f"response.{response['status']}", response=response),
        ]

    def _deltas(self, parts: list[ReplyPart]) -> list[dict[str, Any]]:
        said = [part.text for part in parts if isinstance(part, Said)]
        self._said += "".join(said)
        return [self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[]) for text in said]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._events += 1
        return {"type": kind, "sequence_number": self._events - 1, **fields}

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        return {
            "id": self._item,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else [_text(text)],
        }

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "model": self._naming.model,
            "status": status,
            "output": output,
            "error": None,
            "incomplete_details": None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "temperature": None,
            "top_p": None,
            "usage": None,
        }


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
