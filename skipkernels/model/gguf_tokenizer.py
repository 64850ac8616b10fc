"""The tokenizer and chat template in a GGUF file's metadata, by transformers' reader, mended where it is wrong."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from skipkernels.errors import ModelError
from skipkernels.model.gguf_file import GgufFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_MODEL, _SPLITS, _TOKENS = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"
_DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "command-r")
"""Splits of text before merging that take digits one by one and go on as GPT-2. transformers 5.23 does not know them
and takes GPT-2's alone, so that "2024" becomes other tokens than the model was trained on."""


def load_gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase | None:
    """None, with a warning, where the file has no vocabulary.

    Raises:
        ModelError: its kind of vocabulary is not supported, or is corrupt.
    """
    from transformers import AutoTokenizer

    if _TOKENS not in file.metadata:
        logger.warning("%s holds no tokenizer; prompts must be token ids", file.path)
        return None
    _check_special_tokens(file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)
    except Exception as error:  # whatever a broken vocabulary makes of transformers' readers
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"{file.path}: its tokenizer ({file.metadata.get(_MODEL)}) cannot be read ({reason})"
        ) from error
    if file.metadata.get(_SPLITS) in _DIGIT_BY_DIGIT:
        from tokenizers import pre_tokenizers

        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return tokenizer


def _check_special_tokens(file: GgufFile) -> None:
    tokens = file.metadata[_TOKENS]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{file.path}: {_TOKENS} must be a list of texts")
    for name in ("bos", "eos", "unknown", "padding"):
        key = f"tokenizer.ggml.{name}_token_id"
        index = file.metadata.get(key)
        if isinstance(index, int) and not 0 <= index < len(tokens):
            raise ModelError(f"{file.path}: {key} is {index}, the vocabulary has {len(tokens)} tokens")
