"""The tokenizer and chat template in a GGUF file's metadata.

Byte pairs over bytes are built here, which takes a tenth of the time of transformers' reader; sentencepiece's and
splits that are not known here are left to that.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from skipkernels.errors import ModelError
from skipkernels.model.gguf_file import GgufFile, Value
from skipkernels.model.gguf_splits import pre_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MODEL, _SPLITS, _TOKENS = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"
_CONTROL, _USER_DEFINED = 3, 4
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def load_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase | None:
    """None, with a warning, where the file has no vocabulary.

    Raises:
        ModelError: its kind of vocabulary is not supported, or is corrupt.
    """
    if _TOKENS not in file.metadata:
        logger.warning("%s holds no tokenizer; prompts must be token ids", file.path)
        return None
    _check_special_tokens(file)
    split = pre_tokenizer(file.metadata.get(_SPLITS)) if file.metadata.get(_MODEL) == "gpt2" else None
    try:
        return _by_transformers(file) if split is None else _byte_level(file, split)
    except Exception as error:  # whatever a broken vocabulary makes of the libraries' readers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{file.path}: its tokenizer ({file.metadata.get(_MODEL)}) cannot be read ({reason})"
        ) from error


def _by_transformers(file: GgufFile) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)


def _byte_level(file: GgufFile, split: PreTokenizer) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    tokens = _list(file, _TOKENS)
    special: dict[str, object] = {}
    for name, key in _SPECIAL.items():
        index = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        special[name] = tokens[index] if isinstance(index, int) else None
    for name in ("add_bos_token", "add_eos_token"):
        if (value := file.metadata.get(f"tokenizer.ggml.{name}")) is not None:
            special[name] = value
    if isinstance(template := file.metadata.get("tokenizer.chat_template"), str):
        special["chat_template"] = template
    return PreTrainedTokenizerFast(tokenizer_object=_backend(file, split), **special)


def _backend(file: GgufFile, split: PreTokenizer) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens, kinds = _list(file, _TOKENS), _list(file, "tokenizer.ggml.token_type")
    merges = [tuple(str(merge).split(" ")) for merge in _list(file, "tokenizer.ggml.merges")]
    vocab = {str(token): index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges))  # type: ignore[arg-type]
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    pairs = list(zip(tokens, kinds, strict=False))
    # they stay whole wherever they stand in a text
    backend.add_special_tokens([AddedToken(str(t), special=True, normalized=False) for t, k in pairs if k == _CONTROL])
    backend.add_tokens([AddedToken(str(t), special=False, normalized=False) for t, k in pairs if k == _USER_DEFINED])
    return backend


def _list(file: GgufFile, key: str) -> list[Value]:
    found = file.metadata.get(key, [])
    if not isinstance(found, list):
        raise ModelError(f"{file.path}: {key} must be a list")
    return list(found)


def _check_special_tokens(file: GgufFile) -> None:
    tokens = file.metadata[_TOKENS]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{file.path}: {_TOKENS} must be a list of texts")
    for name in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        index = file.metadata.get(key)
        if isinstance(index, int) and not 0 <= index < len(tokens):
            raise ModelError(f"{file.path}: {key} is {index}, the vocabulary has {len(tokens)} tokens")
