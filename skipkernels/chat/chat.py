"""Chats as models see them: decoded and checked, independent of HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from skipkernels.chat.grammar import GrammarText
from skipkernels.decoding.generation import SamplingParams, TokenLogprob
from skipkernels.modality.job import Request
from skipkernels.modality.strategy import ModalityModel

EXPECTED_NEW_TOKENS = 256
"""What an answer without a limit of its own is taken to cost when requests are scheduled."""


@dataclass(frozen=True, eq=False)
class Image:
    """A picture in a message; its modality is ``image``."""

    pixels: npt.NDArray[np.uint8]  # [height, width, 3], RGB


@dataclass(frozen=True, eq=False)
class Audio:
    """A recording in a message; its modality is ``audio``."""

    samples: npt.NDArray[np.float32]  # [samples], mono, in [-1, 1]
    rate_hz: int


Part = str | Image | Audio
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, eq=False)
class Message:
    """One turn. ``fields``: what else the chat template may look at, like ``tool_calls``."""

    role: Role
    parts: tuple[Part, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Its text parts, concatenated."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, eq=False)
class Chat:
    """A request to a model.

    Args:
        messages: at least one.
        max_new_tokens: None: as many as the context has room for, and never more.
        stop: strings that end the answer; they are not part of it.
        grammar: what the answer has to follow.
        tools: as OpenAI writes them; for the chat template.
        continues: the last message, an assistant's, is the begin of the answer.
        template_options: further arguments of the chat template.
    """

    messages: tuple[Message, ...]
    max_new_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    grammar: GrammarText | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    continues: bool = False
    template_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """The answer to a chat: the output of a ``ChatModel`` for each request."""

    text: str
    finish_reason: Literal["stop", "length"]  # end of sequence or a stop string; max_new_tokens reached
    prompt_tokens: int
    new_tokens: int
    skip_ratio: float  # share of FFN bytes not read, over layers x new tokens
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None  # where they were asked
    after_first_ms: float | None = None  # from the first token to the last
    gaps_ms: tuple[float, ...] = ()  # between two tokens
    bytes_not_read: int = 0  # of weights

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens


class ChatFormat(Protocol):
    """The part of a model that needs no weights: it turns chats into the model's inputs.

    It may run in another thread or process than the model, and is picklable.
    """

    modalities: tuple[str, ...]
    """What messages may hold: ``text``, ``image``, ``audio``."""

    @property
    def has_template(self) -> bool:
        """Whether the model was trained on conversations; else a prompt is the text of a single message."""
        ...

    def request(self, chat: Chat) -> Request:
        """
        Raises:
            RequestError: the model cannot answer this chat; the message says why.
        """
        ...


class ChatModel(ModalityModel, Protocol):
    """A model whose inputs come from ``format`` and whose outputs are ``Completion`` objects."""

    format: ChatFormat


def modality_of(part: Part) -> str:
    """By name."""
    return {str: "text", Image: "image", Audio: "audio"}[type(part)]


def modalities_of(messages: Sequence[Message]) -> frozenset[str]:
    """What the messages hold, by modality name."""
    return frozenset(modality_of(part) for message in messages for part in message.parts)
