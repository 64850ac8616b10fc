"""Chats as models see them: decoded and checked, independent of HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from skipkernels.decoding.generation import SamplingParams
from skipkernels.modality.job import Request
from skipkernels.modality.strategy import ModalityModel

DEFAULT_NEW_TOKENS = 128
"""Default of ``Chat.max_new_tokens``: a long answer would delay the rest of its batch."""


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
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, eq=False)
class Message:
    """One turn."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its text parts, concatenated."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, eq=False)
class Chat:
    """A request to a model.

    Args:
        messages: at least one.
        max_new_tokens: None: ``DEFAULT_NEW_TOKENS``, or fewer if the context is full before.
        stop: strings that end the answer; they are not part of it.
    """

    messages: tuple[Message, ...]
    max_new_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The answer to a chat: the output of a ``ChatModel`` for each request."""

    text: str
    finish_reason: Literal["stop", "length"]  # end of sequence or a stop string; max_new_tokens reached
    prompt_tokens: int
    new_tokens: int
    skip_ratio: float  # skipped FFN executions over layers x new tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens


class ChatFormat(Protocol):
    """The part of a model that needs no weights: it turns chats into the model's inputs.

    It may run in another thread or process than the model, and is picklable.
    """

    modalities: tuple[str, ...]
    """What messages may hold: ``text``, ``image``, ``audio``."""

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
