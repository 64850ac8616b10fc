"""Turns chats into prompts for text models."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from skipkernels.chat.chat import DEFAULT_NEW_TOKENS, Chat
from skipkernels.decoding.generation import SamplingParams
from skipkernels.errors import RequestError
from skipkernels.modality.job import Request
from skipkernels.skipping.policy import RAMP_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROFILED_PROMPT_TOKENS, PROFILED_NEW_TOKENS = 32, RAMP_TOKENS
"""Tokens of the request whose work is 1: new tokens as many as a held skip ratio needs to reach its target."""


@dataclass(frozen=True)
class TextPrompt:
    """The ``text`` modality of a request: what to decode from, and how."""

    token_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()


class TextFormat:
    """A ``ChatFormat``: the tokenizer's chat template, or else a single message that is the prompt itself.

    Args:
        max_seq_len: positions that the model's cache holds.
        prefill_share: cost of a prompt token as a share of a new token's.
    """

    modalities: tuple[str, ...] = ("text",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, prefill_share: float) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)  # a copy, because the model uses its own in another thread
        self._max_seq_len = max_seq_len
        self._prefill_share = prefill_share

    def request(self, chat: Chat) -> Request:
        token_ids = self._encode(chat)
        new_tokens = allowed_new_tokens(chat, len(token_ids), self._max_seq_len)
        prompt = TextPrompt(tuple(token_ids), new_tokens, chat.sampling, chat.stop)
        return Request({"text": prompt}, work=work_of(len(token_ids), new_tokens, self._prefill_share))

    def _encode(self, chat: Chat) -> list[int]:
        if not any(message.text for message in chat.messages):
            raise RequestError("the messages hold no text; say something")
        if self._tokenizer.chat_template:
            return self._apply_template(chat)
        if len(chat.messages) != 1 or chat.messages[0].role != "user":
            raise RequestError(
                f"this model has no chat template: its prompt is the text of one user message, got "
                f"{len(chat.messages)} messages, the first by {chat.messages[0].role!r}"
            )
        return list(self._tokenizer.encode(chat.messages[0].text))

    def _apply_template(self, chat: Chat) -> list[int]:
        messages = [{"role": message.role, "content": message.text} for message in chat.messages]
        try:
            encoded = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        except ImportError:
            raise
        except Exception as error:  # templates raise anything for messages they do not support
            raise RequestError(f"this model's chat template refuses these messages: {error}") from error
        return list(cast(dict[str, list[int]], encoded)["input_ids"])


def work_of(prompt_tokens: int, new_tokens: int, prefill_share: float) -> float:
    """The cost of a request, see ``Request.work``.

    Args:
        prefill_share: what a token of the prompt costs, as a share of a new token.
    """
    profiled = PROFILED_NEW_TOKENS + prefill_share * PROFILED_PROMPT_TOKENS
    return (new_tokens + prefill_share * prompt_tokens) / profiled


def allowed_new_tokens(chat: Chat, prompt_tokens: int, max_seq_len: int) -> int:
    """The number of new tokens that a chat may have.

    Raises:
        RequestError: the prompt, or what the chat asks for after it, does not fit a cache of ``max_seq_len``.
    """
    room = max_seq_len - prompt_tokens + 1  # the last token is not cached
    if room < 1:
        raise RequestError(f"the prompt has {prompt_tokens} tokens, this model takes {max_seq_len}; shorten it")
    if chat.max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, room)
    if chat.max_new_tokens > room:
        raise RequestError(
            f"{chat.max_new_tokens} new tokens do not fit: the prompt's {prompt_tokens} leave room for {room} in a "
            f"context of {max_seq_len}; ask for fewer or shorten the prompt"
        )
    return chat.max_new_tokens
