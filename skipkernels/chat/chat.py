"""A conversation as models see it: decoded, checked, and free of any protocol."""

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
"""Where a chat does not say: a request without an end would keep the rest of its batch waiting."""


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
        """Its parts that are text, one after the other."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, eq=False)
class Chat:
    """What is asked of a model.

    Args:
        messages: at least one.
        max_new_tokens: None: ``DEFAULT_NEW_TOKENS``, or as many as there is room for.
        stop: strings that end the answer; they are not part of it.
    """

    messages: tuple[Message, ...]
    max_new_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """The answer to a chat: what a ``ChatModel`` puts out for each request."""

    text: str
    finish_reason: Literal["stop", "length"]  # it ended by itself or at a stop string; no more tokens were allowed
    prompt_tokens: int
    new_tokens: int
    skip_ratio: float  # skipped FFN executions over layers x new tokens

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens


class ChatFormat(Protocol):
    """The half of a model that needs no weights: it turns chats into the model's inputs.

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
