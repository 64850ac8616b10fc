"""Turns chats into prompts for text models."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from skipkernels.chat.chat import EXPECTED_NEW_TOKENS, Chat
from skipkernels.chat.grammar import GrammarText, KnownTokens
from skipkernels.chat.reply_parser import ReplyForm, ToolForm
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
    """The ``text`` modality of a request: what to decode from, and how. ``eos_token_ids`` None: the model's own."""

    token_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    grammar: GrammarText | KnownTokens | None = None
    eos_token_ids: tuple[int, ...] | None = None


class TextFormat:
    """A ``ChatFormat``: the tokenizer's chat template, or else a single message that is the prompt itself. Several
    threads may use it.

    Args:
        max_seq_len: positions that the model's cache holds.
        prefill_share: cost of a prompt token as a share of a new token's.
    """

    modalities: tuple[str, ...] = ("text",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, prefill_share: float) -> None:
        self._original = copy.deepcopy(tokenizer)  # copies, because the model uses its own in another thread
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)
        self.max_seq_len = max_seq_len
        self._prefill_share = prefill_share
        self._own = threading.local()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_own", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._own, self._lock = threading.local(), threading.Lock()

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        """This thread's: a tokenizer refuses two at a time."""
        if not hasattr(self._own, "tokenizer"):
            with self._lock:
                self._own.tokenizer = copy.deepcopy(self._original)
        return self._own.tokenizer

    def request(self, chat: Chat) -> Request:
        return self.prompt_request(
            self._encode(chat), chat.max_new_tokens, chat.sampling, stop=chat.stop, grammar=chat.grammar
        )

    def prompt_request(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int | None,
        sampling: SamplingParams,
        *,
        stop: tuple[str, ...] = (),
        grammar: GrammarText | KnownTokens | None = None,
        eos_token_ids: tuple[int, ...] | None = None,
    ) -> Request:
        """A request that is a prompt already; ``max_new_tokens`` as in ``Chat``."""
        new_tokens = allowed_new_tokens(max_new_tokens, len(token_ids), self.max_seq_len)
        prompt = TextPrompt(tuple(token_ids), new_tokens, sampling, stop, grammar, eos_token_ids)
        expected = min(new_tokens, max_new_tokens or EXPECTED_NEW_TOKENS)
        work = work_of(len(token_ids), expected, self._prefill_share)
        return Request({"text": prompt}, work=work, prompt_tokens=len(token_ids), new_tokens=expected)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """
        Raises:
            RequestError: it has more characters than the longest tokens make up; it is not encoded at all.
        """
        most = self.max_seq_len * self._longest_token
        if len(text) > most:
            raise RequestError(
                f"the prompt has {len(text):,} characters; this model takes {self.max_seq_len} tokens, which are "
                f"{most:,} characters at most; shorten it"
            )
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    @property
    def has_template(self) -> bool:
        return bool(self._original.chat_template)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokenizer's own; the model may have more."""
        return () if self._original.eos_token_id is None else (self._original.eos_token_id,)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))

    def text_of_prompt(self, token_ids: Sequence[int]) -> str:
        """What was said, without the token that the tokenizer puts in front of it."""
        begins = bool(token_ids) and token_ids[0] == self._original.bos_token_id
        return self.decode(token_ids[1:] if begins else token_ids)

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises RequestError for an id outside of the vocabulary."""
        size = len(self._original)
        outside = [token for token in token_ids if not 0 <= token < size]
        if outside:
            raise RequestError(f"token id {outside[0]} is outside the vocabulary of {size}")

    def reply_form(self, chat: Chat) -> ReplyForm:
        """How the model writes its answer to this chat."""
        template = str(self._original.chat_template or "")
        thinks = "<think>" in template
        thinking = thinks and not chat.continues and self._rendered(chat).rstrip().endswith("<think>")
        return ReplyForm(self.tool_form if chat.tools else None, thinks, thinking)

    @property
    def tool_form(self) -> ToolForm | None:
        """How the model was trained to call tools; None: its template knows none."""
        template = str(self._original.chat_template or "")
        if "tools" not in template:
            return None
        return "hermes" if "<tool_call>" in template else "llama3"

    def _encode(self, chat: Chat) -> list[int]:
        if not any(message.text or message.fields for message in chat.messages):
            raise RequestError("the messages hold no text; say something")
        if chat.tools and self.tool_form is None:
            message = "this model's chat template knows no tools; leave tools out, or serve a model that does"
            raise RequestError(message, param="tools")
        if self.has_template:
            return self.encode(self._rendered(chat), add_special_tokens=False)
        if len(chat.messages) != 1 or chat.messages[0].role != "user":
            raise RequestError(
                f"this model has no chat template: its prompt is the text of one user message, got "
                f"{len(chat.messages)} messages, the first by {chat.messages[0].role!r}"
            )
        return self.encode(chat.messages[0].text)

    def _rendered(self, chat: Chat) -> str:
        messages: list[Mapping[str, Any]] = [
            {"role": message.role, "content": message.text, **message.fields} for message in chat.messages
        ]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,  # type: ignore[arg-type]
                    tools=[dict(tool) for tool in chat.tools] or None,
                    add_generation_prompt=not chat.continues,
                    continue_final_message=chat.continues,
                    tokenize=False,
                    **chat.template_options,
                )
            )
        except ImportError:
            raise
        except Exception as error:  # templates raise anything for messages they do not support
            raise RequestError(f"this model's chat template refuses these messages: {error}") from error


def work_of(prompt_tokens: int, new_tokens: int, prefill_share: float) -> float:
    """The cost of a request, see ``Request.work``.

    Args:
        prefill_share: what a token of the prompt costs, as a share of a new token.
    """
    profiled = PROFILED_NEW_TOKENS + prefill_share * PROFILED_PROMPT_TOKENS
    return (new_tokens + prefill_share * prompt_tokens) / profiled


def allowed_new_tokens(asked: int | None, prompt_tokens: int, max_seq_len: int) -> int:
    """The number of new tokens that an answer may have: what was asked for, or less where the context is full before.

    Raises:
        RequestError: the prompt does not fit a cache of ``max_seq_len``.
    """
    room = max_seq_len - prompt_tokens + 1  # the last token is not cached
    if room < 1:
        raise RequestError(f"the prompt has {prompt_tokens} tokens, this model takes {max_seq_len}; shorten it")
    return room if asked is None else min(asked, room)
