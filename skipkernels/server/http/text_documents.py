"""The JSON of ``/v1/completions``, with echo and log probabilities as evaluations ask for them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from skipkernels.chat.chat import Completion
from skipkernels.chat.progress import Piece
from skipkernels.decoding.generation import TokenLogprob
from skipkernels.modality.job import JobAnswer
from skipkernels.server.http.dialect import DONE, Naming, completions_of, rest_of, strategy_of


@dataclass(frozen=True)
class Echo:
    """The prompt of one answer.

    Args:
        wanted: whether it is a part of the answer's text.
        told: its tokens' log probabilities are wanted, too. All but the first were generated, as they stand.
        limit: new tokens after it.
    """

    token_ids: tuple[int, ...]
    wanted: bool
    told: bool
    limit: int


class TextDocuments:
    """A ``Dialect``.

    Args:
        echoes: one for each answer.
        logprobs: how many of the likeliest tokens are told; None: none.
        token_text: of one token.
        prompt_text: of the tokens of a prompt, without what the tokenizer put in front of it.
        eos: tokens that end what follows an echoed prompt.
    """

    last_event = DONE

    def __init__(
        self,
        naming: Naming,
        echoes: Sequence[Echo],
        *,
        logprobs: int | None,
        usage: bool,
        token_text: Callable[[int], str],
        prompt_text: Callable[[Sequence[int]], str],
        eos: tuple[int, ...],
    ) -> None:
        self._naming = naming
        self._echoes = echoes
        self._logprobs = logprobs
        self._usage = usage
        self._token_text = token_text
        self._prompt_text = prompt_text
        self._eos = eos
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._sent = [""] * len(echoes)

    def whole(self, answer: JobAnswer) -> dict[str, Any]:
        completions = completions_of(answer)
        choices = [self._choice(index, completion) for index, completion in enumerate(completions)]
        return self._head() | {
            "choices": choices,
            "usage": self._counts(completions),
            "skipkernels": strategy_of(answer),
        }

    def begin(self) -> list[dict[str, Any]]:
        return [
            self._chunk(index, self._prompt_text(echo.token_ids))
            for index, echo in enumerate(self._echoes)
            if echo.wanted and not echo.told
        ]

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        if self._echoes[piece.index].told:
            return []  # told as a whole at the end
        self._sent[piece.index] += piece.text
        told = None
        if self._logprobs is not None and piece.logprobs:
            tokens = [token for token, _ in piece.logprobs]
            told = self._told(tokens, [own for _, own in piece.logprobs])
        return [self._chunk(piece.index, piece.text, logprobs=told)]

    def end(self, answer: JobAnswer) -> list[dict[str, Any]]:
        documents = []
        completions = completions_of(answer)
        for index, completion in enumerate(completions):
            if self._echoes[index].told:
                choice = self._choice(index, completion)
                documents.append(self._chunk(index, choice["text"], choice["finish_reason"], choice["logprobs"]))
            else:
                rest = rest_of(completion, self._sent[index])
                documents.append(self._chunk(index, rest, completion.finish_reason))
        documents[-1]["skipkernels"] = strategy_of(answer)
        if self._usage:
            documents.append(self._head() | {"choices": [], "usage": self._counts(completions)})
        return documents

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        echo = self._echoes[index]
        if not echo.told:
            text = completion.text
            told = None
            if self._logprobs is not None and completion.logprobs is not None:
                told = self._told(completion.token_ids, completion.logprobs)
            if echo.wanted:
                text = self._prompt_text(echo.token_ids) + text
            return {"index": index, "text": text, "finish_reason": completion.finish_reason, "logprobs": told}
        known, new = self._after_echo(echo, completion)
        assert completion.logprobs is not None, "they were asked for"
        tokens = [*echo.token_ids, *new]
        shown_of_first = self._prompt_text(tokens[:1])
        hidden = 0 if shown_of_first else len(self._token_text(tokens[0]))
        told = self._told(tokens, [None, *completion.logprobs[: known + len(new)]], hidden)
        reason = "stop" if new and new[-1] in self._eos else "length"
        shown = [token for token in tokens if token not in self._eos or token in echo.token_ids]
        return {"index": index, "text": self._prompt_text(shown), "finish_reason": reason, "logprobs": told}

    def _after_echo(self, echo: Echo, completion: Completion) -> tuple[int, list[int]]:
        """How many generated tokens are the prompt's, and those that follow."""
        known = len(echo.token_ids) - 1
        new = list(completion.token_ids[known : known + echo.limit])
        end = next((at + 1 for at, token in enumerate(new) if token in self._eos), len(new))
        return known, new[:end]

    def _told(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], hidden: int = 0) -> dict[str, Any]:
        """``hidden``: characters of the first token that the text does not begin with."""
        texts = [self._token_text(token) for token in tokens]
        offsets, at = [], -hidden
        for text in texts:
            offsets.append(max(0, at))
            at += len(text)
        top = [
            None if own is None else {self._token_text(token): logprob for token, logprob in own.top}
            for own in logprobs
        ]
        return {
            "tokens": texts,
            "token_logprobs": [None if own is None else own.logprob for own in logprobs],
            "top_logprobs": top,
            "text_offset": offsets,
        }

    def _counts(self, completions: Sequence[Completion]) -> dict[str, int]:
        prompt_tokens = sum(len(echo) for echo in {echo.token_ids for echo in self._echoes})
        new_tokens = sum(
            len(self._after_echo(echo, completion)[1]) if echo.told else completion.new_tokens
            for echo, completion in zip(self._echoes, completions, strict=True)
        )
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": new_tokens,
            "total_tokens": prompt_tokens + new_tokens,
        }

    def _chunk(
        self, index: int, text: str, finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "text": text, "finish_reason": finish_reason, "logprobs": logprobs}
        return self._head() | {"choices": [choice]}

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._naming.model,
            "system_fingerprint": self._naming.fingerprint,
        }
