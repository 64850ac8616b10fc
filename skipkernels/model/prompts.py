"""What callers mean by a prompt: every container of text, token ids and messages, taken apart once."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from skipkernels.errors import PromptTypeError, RequestError
from skipkernels.model.prompt import EmbeddedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Message = dict[str, Any]
Prompt = str | Sequence[int] | Sequence[Message] | EmbeddedPrompt
"""Text, token ids, a chat as a list of ``{"role": ..., "content": ...}`` messages, or embeddings."""

_ACCEPTED = (
    "a prompt is text, token ids (a list, an array, a tensor, what a tokenizer returns), a chat (a list of messages "
    "with role and content) or an EmbeddedPrompt; several prompts are a list of these"
)
_IDS, _MASK = "input_ids", "attention_mask"
_BESIDE_IDS = (_MASK, "token_type_ids", "special_tokens_mask", "offset_mapping", "length")
"""What a tokenizer returns beside the ids; all but the mask says nothing that the engine would need."""


def listed_prompts(given: Any) -> list[Prompt]:
    """One prompt or several, as a list of prompts.

    Raises:
        PromptTypeError: what is given is no prompt.
    """
    whole = _whole(given)
    if whole is not None:
        return whole
    items = _items(given)
    if not items:
        return []
    if all(map(_is_id, items)):
        return [[int(item) for item in items]]
    if any(map(_is_message, items)):
        return [_chat(items)]
    return [prompt for item in items for prompt in _inner(item)]


def single_prompt(given: Any) -> Prompt:
    """The one prompt that is given, perhaps in a list or a batch of its own."""
    listed = listed_prompts(given)
    if not listed and not isinstance(given, Mapping):
        return []  # no tokens at all
    if len(listed) != 1:
        raise RequestError(f"one prompt is taken here, got {len(listed)}")
    return listed[0]


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of text, with the tokenizer's special tokens, or of a chat, through its template."""
    if isinstance(prompt, str):
        return _encode_text(prompt, tokenizer)
    if not tokenizer.chat_template:
        raise RequestError("this tokenizer has no chat template; pass the prompt as text")
    chat = cast("list[dict[str, str]]", list(cast(Sequence[Message], prompt)))
    for message in chat:
        content = message.get("content")
        if not isinstance(content, str | list | tuple) and not (content is None and "tool_calls" in message):
            raise PromptTypeError(
                f"a message's content must be text or a list of parts, got a {type(content).__name__}"
            )
    try:
        encoded = cast(
            "dict[str, list[int]]",
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True),
        )
        return list(encoded[_IDS])
    except Exception as error:  # templates raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"the chat template refuses this chat ({reason})") from error


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the prompt is not valid Unicode text ({error.reason} at {error.start})") from error
    ids = list(tokenizer.encode(text, verbose=False))  # not of its length: the engine refuses what does not fit
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        logger.warning(
            "the prompt begins with %s and the tokenizer adds another; pass a chat as messages, or leave it out",
            tokenizer.bos_token,
        )
    return ids


def _whole(given: Any) -> list[Prompt] | None:
    """The prompts in what is no plain sequence of prompts, ids or messages; None for such a sequence."""
    if isinstance(given, str | EmbeddedPrompt):
        return [given]
    if isinstance(given, torch.Tensor | np.ndarray) and not _is_object_array(given):
        return _of_array(given)
    if hasattr(given, "ids") and hasattr(given, "tokens"):  # one text's encoding, by the tokenizers library
        return [list(given.ids)]
    if isinstance(given, Mapping):
        return [_chat([given])] if _is_message(given) else _of_encoding(given)
    if isinstance(given, bytes | bytearray | memoryview | PurePath | io.IOBase | AbstractSet):
        raise _refusal(given)
    return None


def _items(given: Any) -> list[Any]:
    """A sequence, an array of objects or an iterator, read once."""
    if not isinstance(given, Iterable):
        raise _refusal(given)
    return list(given)


def _inner(item: Any) -> list[Prompt]:
    """The prompts of one element of a batch."""
    whole = _whole(item)
    if whole is not None:
        return whole
    inner = _items(item)
    if all(map(_is_id, inner)):
        return [[int(value) for value in inner]]
    return [_chat(inner)]


def _chat(items: list[Any]) -> list[Message]:
    for item in items:
        if not _is_message(item):
            raise _refusal(item)
    return [dict(item) for item in items]


def _of_array(array: Any) -> list[Prompt]:
    """Rows of ids."""
    if isinstance(array, np.ndarray) and array.dtype.kind == "U":
        return listed_prompts(array.tolist())
    is_integer = (
        array.dtype.kind in "iu"
        if isinstance(array, np.ndarray)
        else not (array.is_floating_point() or array.is_complex() or array.dtype == torch.bool)
    )
    if not is_integer or array.ndim not in (1, 2):
        kind = f"{type(array).__name__} of {array.dtype} and shape {tuple(array.shape)}"
        raise PromptTypeError(f"a prompt cannot be a {kind}, expected integers in one or two dimensions; {_ACCEPTED}")
    return [array.tolist()] if array.ndim == 1 else cast("list[Prompt]", array.tolist())


def _of_encoding(encoding: Mapping[str, Any]) -> list[Prompt]:
    """What a tokenizer returned: ids, and a mask of what is padding."""
    if _IDS not in encoding:
        keys = ", ".join(map(str, encoding)) or "nothing"
        raise PromptTypeError(f"a prompt cannot be a mapping of {keys}; {_ACCEPTED}")
    for name in encoding:
        if name not in (_IDS, *_BESIDE_IDS):
            raise PromptTypeError(f"a prompt's {name} would be ignored; pass {_IDS} and {_MASK}, or an EmbeddedPrompt")
    prompts = _id_lists(encoding[_IDS])
    if encoding.get(_MASK) is None:
        return cast("list[Prompt]", prompts)
    masks = _id_lists(encoding[_MASK])
    if [len(mask) for mask in masks] != [len(ids) for ids in prompts]:
        raise RequestError(f"{_MASK} and {_IDS} differ in shape")
    return [_unpadded(ids, mask) for ids, mask in zip(prompts, masks, strict=True)]


def _id_lists(given: Any) -> list[list[int]]:
    is_flags = isinstance(given, torch.Tensor | np.ndarray) and given.dtype in (torch.bool, np.bool_)
    lists = listed_prompts(given * 1 if is_flags else given) or [[]]
    for ids in lists:
        if not isinstance(ids, list) or not all(map(_is_id, ids)):
            raise _refusal(given)
    return cast("list[list[int]]", lists)


def _unpadded(ids: list[int], mask: list[int]) -> list[int]:
    """Without the padding at either end."""
    kept = [at for at, keep in enumerate(mask) if keep]
    if kept and kept[-1] - kept[0] >= len(kept):
        raise RequestError(f"{_MASK} leaves out tokens between others; only padding at the ends can be left out")
    return [ids[at] for at in kept]


def _is_id(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim == 0 and _is_id(value.item())
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str)


def _is_object_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "O"


def _refusal(value: Any) -> PromptTypeError:
    return PromptTypeError(f"a prompt cannot be a {type(value).__name__}; {_ACCEPTED}")
