"""How byte-pair tokenizers split text before merging: the patterns behind the names that GGUF files give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipkernels.errors import ModelError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
PATTERNS = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}
"""GGUF's name -> the pattern whose matches are merged alone."""
GPT2 = "gpt-2"
DIGIT_BY_DIGIT = "smollm"
"""Digits one by one, the rest as GPT-2."""
_ALSO = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "llama-bpe", "deepseek-r1-qwen": "qwen2"} | {
    "starcoder": DIGIT_BY_DIGIT,
    "refact": DIGIT_BY_DIGIT,
    "command-r": DIGIT_BY_DIGIT,
}
"""Other names of the same splits."""


def pre_tokenizer(name: object) -> PreTokenizer | None:
    """The split that a GGUF file names; None: it is not known here."""
    from tokenizers import Regex, pre_tokenizers

    known = _ALSO.get(str(name), name)
    if known == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if known == DIGIT_BY_DIGIT:
        first = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if known in PATTERNS:
        split = pre_tokenizers.Split(Regex(PATTERNS[str(known)]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return None


def split_name(pre_tokenizer: dict[str, Any] | None, source: str) -> str:
    """GGUF's name of what a ``tokenizer.json`` calls its pre-tokenizer.

    Raises:
        ModelError: llama.cpp has no such split under a name that is known here.
    """
    parts = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    first, last = parts[0], parts[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(parts) == 1 and last.get("use_regex"):
            return GPT2
        if len(parts) == 2 and first.get("type") == "Digits" and first.get("individual_digits") and last["use_regex"]:
            return DIGIT_BY_DIGIT
        if len(parts) == 2 and first.get("type") == "Split" and not last.get("use_regex"):
            pattern = first["pattern"].get("Regex")
            for name, known in PATTERNS.items():
                if pattern == known and first["behavior"] == "Isolated":
                    return name
    raise ModelError(
        f"{source}: its tokenizer splits text in a way that has no known name in GGUF ({pre_tokenizer}); known are "
        f"{', '.join((GPT2, DIGIT_BY_DIGIT, *PATTERNS))}"
    )
