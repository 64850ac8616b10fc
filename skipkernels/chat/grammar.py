"""What an answer has to follow: JSON, a schema, a regular expression, a grammar; or tokens that are known already.

llguidance says which tokens may come next (Microsoft, github.com/guidance-ai/llguidance): some 50 us a token, on the
host, before the step. It is the optional extra ``grammar``.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from skipkernels.decoding.generation import Grammar
from skipkernels.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["json_schema", "regex", "lark"]
ANY_OBJECT = '{"type": "object"}'
"""The schema of OpenAI's ``json_object``."""


@dataclass(frozen=True)
class GrammarText:
    """A grammar as it is written; picklable. ``param``: the field of a request that holds it, for errors."""

    kind: Kind
    text: str
    param: str | None = None


@dataclass(frozen=True)
class KnownTokens:
    """The answer begins with these tokens; what comes then is free. For log probabilities of a given text."""

    token_ids: tuple[int, ...]


class Grammars:
    """Makes a ``Grammar`` for each answer of one tokenizer's model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._lock = threading.Lock()
        self._compiled: Any = None  # llguidance's view of the tokenizer

    def grammar(self, given: GrammarText | KnownTokens) -> Grammar:
        """
        Raises:
            RequestError: it cannot be compiled, or llguidance is not installed.
        """
        if isinstance(given, KnownTokens):
            return _Known(given.token_ids)
        matcher = _llguidance(given).LLMatcher(self._tokens(given), _written(given))
        if matcher.is_error():
            raise RequestError(f"this {given.kind} cannot be followed: {matcher.get_error()}", param=given.param)
        return _Matched(matcher, self._eos)

    def _tokens(self, given: GrammarText) -> Any:
        with self._lock:
            if self._compiled is None:
                from llguidance.hf import from_tokenizer
                from transformers import TokenizersBackend

                if not isinstance(self._tokenizer, TokenizersBackend):
                    kind = type(self._tokenizer).__name__
                    message = f"grammars need a tokenizer of the tokenizers library, this one is a {kind}"
                    raise RequestError(message, param=given.param)
                eos = list(self._eos) or None
                self._compiled = from_tokenizer(self._tokenizer, n_vocab=self._vocab_size, eos_token=eos)
            return self._compiled


def check_grammar(given: GrammarText) -> None:
    """Before it is queued.

    Raises:
        RequestError: it is not well-formed, or llguidance is not installed.
    """
    try:
        problem = _llguidance(given).LLMatcher.validate_grammar(_written(given))
    except ValueError as error:
        problem = str(error)
    if problem:
        raise RequestError(f"this {given.kind} cannot be followed: {problem}", param=given.param)


def _written(given: GrammarText) -> Any:
    matcher = _llguidance(given).LLMatcher
    make = {
        "json_schema": matcher.grammar_from_json_schema,
        "regex": matcher.grammar_from_regex,
        "lark": matcher.grammar_from_lark,
    }
    return make[given.kind](given.text)


def _llguidance(given: GrammarText) -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "this server cannot follow grammars: llguidance is not installed (pip install skipkernels[grammar])",
            param=given.param,
        ) from error
    return llguidance


class _Matched:
    """llguidance's state of one answer. Where it finds no way on, only an end of sequence may come."""

    def __init__(self, matcher: Any, eos: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._eos = eos

    def allow(self, words: npt.NDArray[np.int32]) -> None:
        if not (self._matcher.is_error() or self._matcher.is_stopped()):
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if words.any():
                return
        _only(words, self._eos)

    def accept(self, token_id: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)


class _Known:
    def __init__(self, token_ids: tuple[int, ...]) -> None:
        self._token_ids = token_ids
        self._at = 0

    def allow(self, words: npt.NDArray[np.int32]) -> None:
        if self._at < len(self._token_ids):
            _only(words, (self._token_ids[self._at],))
        else:
            words[:] = -1

    def accept(self, token_id: int) -> None:
        self._at += 1


def _only(words: npt.NDArray[np.int32], token_ids: tuple[int, ...]) -> None:
    words[:] = 0
    bits = words.view(np.uint32)
    for token in token_ids:
        bits[token // 32] |= np.uint32(1 << (token % 32))
