"""Reads chats to profile a model on from a JSON lines file; messages are as clients send them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from skipkernels.chat.chat import Chat, ChatFormat, modalities_of
from skipkernels.chat.chat_profile import ChatSample
from skipkernels.chat.text_format import PROFILED_NEW_TOKENS
from skipkernels.errors import RequestError
from skipkernels.modality.errors import ProfileError
from skipkernels.server.http.conversion import decode_messages
from skipkernels.server.http.errors import HttpError
from skipkernels.server.http.limits import RequestLimits
from skipkernels.server.http.schema import MOST_ITEMS, ChatMessage, Strict
from skipkernels.support.files import read_text


@dataclass(frozen=True, eq=False)
class ChatLine:
    """One line of a file.

    Args:
        where: file and line, for errors.
        expected: the right answer, where one is given.
    """

    where: str
    chat: Chat
    expected: str | None


class _Line(Strict):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_ITEMS)
    expected: str | None = None


def read_chats(path: str | Path, limits: RequestLimits) -> list[ChatLine]:
    """Reads lines such as ``{"messages": [{"role": "user", "content": "..."}], "expected": "..."}``. Empty lines are
    skipped. Either all lines have ``expected``, the right answer, or none has.

    Raises:
        ProfileError: unreadable, no chats, or a line that is not one; the message names the line.
    """
    lines = read_text(path, ProfileError).splitlines()
    chats = [_read_line(line, f"{path}, line {number}", limits) for number, line in enumerate(lines, 1) if line.strip()]
    if not chats:
        raise ProfileError(f"{path}: holds no chats; write one JSON object with messages in each line")
    for chat in chats[1:]:
        if (chat.expected is None) != (chats[0].expected is None):
            has, other = ("none", "has one") if chat.expected is None else ("one", "has none")
            raise ProfileError(f"{chat.where}: expected: has {has}, the first line {other}; give it in all or in none")
    return chats


def samples_of(chats: Sequence[ChatLine], chat_format: ChatFormat) -> list[ChatSample]:
    """The chats as a model's requests.

    Raises:
        ProfileError: one lacks what the model takes, or the model cannot answer it; the message names the line.
    """
    samples = []
    for line in chats:
        missing = sorted(set(chat_format.modalities) - modalities_of(line.chat.messages))
        if missing:
            raise ProfileError(
                f"{line.where}: holds no {missing[0]}; a chat to profile on holds all that the model takes, "
                f"{', '.join(sorted(chat_format.modalities))}"
            )
        try:
            samples.append(ChatSample(chat_format.request(line.chat), line.expected))
        except RequestError as error:
            raise ProfileError(f"{line.where}: {error}") from error
    return samples


def _read_line(text: str, where: str, limits: RequestLimits) -> ChatLine:
    try:
        line = _Line.model_validate_json(text)
        messages = decode_messages(line.messages, limits)
    except ValidationError as error:
        raise ProfileError(f"{where}: {HttpError.of_validation(error)}") from error
    except HttpError as error:
        raise ProfileError(f"{where}: {f'{error.param}: ' if error.param else ''}{error}") from error
    return ChatLine(where, Chat(messages, max_new_tokens=PROFILED_NEW_TOKENS), line.expected)
