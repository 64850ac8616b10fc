"""What a model's text means: what it says, what it thinks, which tools it calls.

Two ways to write a call are common: Hermes and Qwen put ``{"name": ..., "arguments": {...}}`` between <tool_call> tags;
Llama 3 answers with ``{"name": ..., "parameters": {...}}`` alone, perhaps behind <|python_tag|>. Models that think put
that between <think> tags. The chat template tells which of them a model was trained on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

ToolForm = Literal["hermes", "llama3"]
_PYTHON_TAG = "<|python_tag|>"
_CALL, _CALL_END = "<tool_call>", "</tool_call>"
_THINK, _THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class ReplyForm:
    """How a model writes.

    Args:
        tools: how it calls tools; None: it was given none.
        thinks: it may think before it speaks.
        thinking: the prompt ends inside of a thought.
    """

    tools: ToolForm | None = None
    thinks: bool = False
    thinking: bool = False


@dataclass(frozen=True)
class Said:
    text: str


@dataclass(frozen=True)
class Thought:
    text: str


@dataclass(frozen=True)
class Called:
    """A tool; ``arguments`` is JSON."""

    name: str
    arguments: str


ReplyPart = Said | Thought | Called


class ReplyParser:
    """Takes a text piece by piece; what may be the begin of a tag is kept until that is known."""

    def __init__(self, form: ReplyForm) -> None:
        self._form = form
        self._state = "thinking" if form.thinking else "open"
        self._kept = ""
        self._begun = False  # something was said or called
        self._after_tag = False  # line ends that follow a tag belong to it
        self._gap = ""  # white space before a call

    def feed(self, text: str) -> list[ReplyPart]:
        self._kept += text
        parts: list[ReplyPart] = []
        while (part := self._next(ended=False)) is not None:
            parts += part
        return parts

    def end(self) -> list[ReplyPart]:
        """No more text comes: an unfinished call is what it says."""
        parts: list[ReplyPart] = []
        while (part := self._next(ended=True)) is not None:
            parts += part
        return parts

    def _next(self, *, ended: bool) -> list[ReplyPart] | None:
        """The next parts; None: more text is needed, or all is said."""
        if self._after_tag:
            self._kept = self._kept.lstrip("\n")
            self._after_tag = not self._kept
        if not self._kept:
            return None
        if self._state == "thinking":
            return self._up_to(_THINK_END, "open", Thought, ended)
        if self._state == "calling":
            return self._call(ended)
        if not self._begun and self._state == "open" and (opening := self._opening(ended)) != "free":
            return [] if opening == "tag" else None
        return self._speech(ended)

    def _opening(self, ended: bool) -> Literal["free", "tag", "wait"]:
        """Before anything was said: a thought, or Llama's bare call."""
        begin = self._kept.lstrip()
        if self._form.thinks:
            if begin.startswith(_THINK):
                self._kept, self._state, self._after_tag = begin[len(_THINK) :], "thinking", True
                return "tag"
            if _THINK.startswith(begin) and not ended:
                return "wait"
        if self._form.tools == "llama3":
            if begin.startswith((_PYTHON_TAG, "{")):
                self._kept, self._state = begin.removeprefix(_PYTHON_TAG), "calling"
                return "tag"
            if (_PYTHON_TAG.startswith(begin) or not begin) and not ended:
                return "wait"
        return "free"

    def _speech(self, ended: bool) -> list[ReplyPart] | None:
        if self._form.tools == "hermes":
            at = self._kept.find(_CALL)
            if at >= 0:
                before, self._kept = self._kept[:at], self._kept[at + len(_CALL) :]
                self._state, self._gap = "calling", before[len(before.rstrip()) :]
                return self._say(before.rstrip()) if before.strip() else []
            keep = 0 if ended else _held_back(self._kept, _CALL)
            if not ended:  # white space before a call belongs to it
                keep = max(keep, len(self._kept) - len(self._kept[: len(self._kept) - keep].rstrip()))
            return self._take(len(self._kept) - keep)
        return self._take(len(self._kept))

    def _take(self, length: int) -> list[ReplyPart] | None:
        text, self._kept = self._kept[:length], self._kept[length:]
        return self._say(text) if text else None

    def _say(self, text: str) -> list[ReplyPart]:
        self._begun = True
        return [Said(text)]

    def _up_to(self, tag: str, then: str, kind: type[Thought], ended: bool) -> list[ReplyPart] | None:
        at = self._kept.find(tag)
        if at >= 0:
            text, self._kept = self._kept[:at], self._kept[at + len(tag) :]
            self._state, self._after_tag = then, True
            return [kind(text.rstrip("\n"))] if text.strip() else []
        keep = 0 if ended else _held_back(self._kept, tag)
        if not ended:
            spoken = self._kept[: len(self._kept) - keep]
            keep += len(spoken) - len(spoken.rstrip("\n"))
        text, self._kept = self._kept[: len(self._kept) - keep], self._kept[len(self._kept) - keep :]
        return [kind(text)] if text else None

    def _call(self, ended: bool) -> list[ReplyPart] | None:
        if self._form.tools == "llama3":
            return self._bare_calls() if ended else None
        at = self._kept.find(_CALL_END)
        if at < 0 and not ended:
            return None
        text, rest = (self._kept[:at], self._kept[at + len(_CALL_END) :]) if at >= 0 else (self._kept, "")
        self._kept, self._state = rest, "open"
        call = _parse_call(text)
        if call is None:
            return self._say(self._gap + _CALL + text + (_CALL_END if at >= 0 else ""))
        self._begun = self._after_tag = True
        return [call]

    def _bare_calls(self) -> list[ReplyPart]:
        """One call, or several with semicolons between them."""
        text, self._kept, self._state = self._kept, "", "open"
        decoder, calls, rest = json.JSONDecoder(), list[ReplyPart](), text.strip()
        while rest:
            try:
                _, end = decoder.raw_decode(rest)
            except json.JSONDecodeError:
                return self._say(text)
            call = _parse_call(rest[:end])
            if call is None:
                return self._say(text)
            calls.append(call)
            rest = rest[end:].lstrip("; \n")
        return calls


def _held_back(text: str, tag: str) -> int:
    """How many characters at the end of ``text`` may begin ``tag``."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-n:])), 0)


def _parse_call(text: str) -> Called | None:
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        return None
    if not isinstance(document, dict) or not isinstance(document.get("name"), str):
        return None
    arguments = document.get("arguments", document.get("parameters", {}))
    return Called(
        document["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    )
