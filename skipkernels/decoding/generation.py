"""What is asked of a generation and what comes back."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from skipkernels.errors import RequestError
from skipkernels.program.state import MAX_TOP_LOGPROBS

if TYPE_CHECKING:
    from transformers import GenerationConfig

_SMALLEST = 1e-30
"""Divisors of logits below it are taken for 0: quotients would not fit fp32."""

FinishReason = Literal["stop", "length"]
"""stop: an end-of-sequence token or a stop string; length: max_new_tokens is reached (OpenAI's names)."""


_REALS = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


class Grammar(Protocol):
    """Says which tokens may come next in one answer."""

    def allow(self, words: npt.NDArray[np.int32]) -> None:
        """Sets bit t % 32 of ``words[t // 32]`` for every token that may come next, and clears the others. At least one
        may: at the end, an end-of-sequence token."""
        ...

    def accept(self, token_id: int) -> None:
        """This one has come."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy.

    Args:
        temperature: 0 is greedy; otherwise the logits are divided by it. Below 1e-30 it counts as 0.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens that holds this probability; 1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output.
        seed: key of the counter-based generator; the same seed gives the same tokens on every executor.
        logit_bias: (token, what is added to its logit) of tokens that shall come more or less often.
        frequency_penalty: what a generated token's logit loses for each time it was generated, up to 127 times.
        presence_penalty: what it loses once.
        logprobs: how many of the likeliest tokens are told with each generated one, and its own log probability;
            None: nothing is. They are the model's own, before everything above.
        grammar: what the answer has to follow; None: nothing. An object of this kind follows one answer only.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name in _REALS:
            _require_number(name, getattr(self, name), numbers.Real)
        for name in ("top_k", "seed"):
            _require_number(name, getattr(self, name), numbers.Integral)
        checks = (
            ("temperature", self.temperature >= 0 and math.isfinite(self.temperature), "a finite number of at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            (
                "repetition_penalty",
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                "a finite number above 0",
            ),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("seed", -(1 << 63) <= self.seed < 1 << 63, "a 64-bit integer"),
        )
        for name, holds, expected in checks:
            if not holds:
                raise RequestError(f"{name} must be {expected}, got {getattr(self, name)}", param=name)
        if self.logprobs is not None:
            _require_number("logprobs", self.logprobs, numbers.Integral)
            if not 0 <= self.logprobs <= MAX_TOP_LOGPROBS:
                raise RequestError(f"logprobs must be in 0 to {MAX_TOP_LOGPROBS}, or None, got {self.logprobs}")
        for token, bias in self.logit_bias:
            _require_number("a token of logit_bias", token, numbers.Integral)
            _require_number("a bias of logit_bias", bias, numbers.Real)
            if not math.isfinite(bias):
                raise RequestError(f"a bias of logit_bias must be a finite number, got {bias}")
        if not _SMALLEST <= self.repetition_penalty <= 1 / _SMALLEST:
            message = f"repetition_penalty={self.repetition_penalty} makes logits overflow; 1 is none"
            raise RequestError(message, param="repetition_penalty")
        if self.temperature < _SMALLEST:  # logits divided by it would overflow; what is left of the others is nothing
            object.__setattr__(self, "temperature", 0.0)


def _require_number(name: str, value: object, kind: type) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        what = "an integer" if kind is numbers.Integral else "a number"
        raise RequestError(f"{name} must be {what}, got {value!r}")


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "bad_words_ids": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": (),
    "guidance_scale": (1.0,),
    "watermarking_config": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "stop_strings": (),
    "token_healing": (False,),
    "max_time": (),
}
"""Entries of a generation config that change what is decoded greedily, and the values with which they do not."""


def default_sampling(generation_config: GenerationConfig | None) -> SamplingParams:
    """Greedy, as transformers would decode with this generation config and ``do_sample=False``.

    Raises:
        RequestError: it asks for what the decode program does not do.
    """
    for name, neutral in _NEUTRAL.items():
        value = getattr(generation_config, name, None)
        if value is not None and value not in neutral:
            raise RequestError(
                f"the model's generation config has {name}={value!r}, which is not supported; "
                "pass sampling=SamplingParams() (--repetition-penalty 1) to decode without it"
            )
    penalty = getattr(generation_config, "repetition_penalty", None)
    return SamplingParams() if penalty is None else SamplingParams(repetition_penalty=penalty)


def checked_stop(stop: Iterable[str]) -> tuple[str, ...]:
    if isinstance(stop, str):
        raise RequestError("stop must be a list of strings, got one string")
    if not isinstance(stop, Iterable):
        raise RequestError(f"stop must be a list of strings, got a {type(stop).__name__}")
    listed = tuple(stop)
    for text in listed:
        if not isinstance(text, str):
            raise RequestError(f"stop must be a list of strings, got a {type(text).__name__} in it")
        if not text:
            raise RequestError("a stop string must not be empty")
    return listed


def checked_eos(eos_token_ids: Iterable[int] | int) -> tuple[int, ...]:
    listed = [eos_token_ids] if isinstance(eos_token_ids, numbers.Integral) else eos_token_ids
    if isinstance(listed, str | bytes) or not isinstance(listed, Iterable):
        raise RequestError(f"eos_token_ids must be integers, got {eos_token_ids!r}")
    ids = []
    for token in listed:
        value = token.item() if hasattr(token, "item") else token
        _require_number("an end-of-sequence token", value, numbers.Integral)
        ids.append(int(value))
    return tuple(token for token in ids if 0 <= token < 1 << 31)


def checked_count(name: str, value: int) -> int:
    _require_number(name, value, numbers.Integral)
    if value < 1:
        raise RequestError(f"{name} must be at least 1, got {value}")
    return int(value)


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token's log probability, and the likeliest tokens in its place with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Generation:
    """The answer to one prompt.

    ``skip_map[t, layer]`` says that the FFN of ``layer`` was skipped for generated token ``t``. ``similarity_map`` has
    the same shape: the cosine of the residual stream before and after each measured FFN, NaN elsewhere. ``unread_map``
    has it too: the share of the FFN's bytes that were not read, 1 where it was skipped, else that of the neurons left
    out.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    skip_map: npt.NDArray[np.bool_]
    similarity_map: npt.NDArray[np.float32]
    unread_map: npt.NDArray[np.float32]
    time_to_first_token_s: float
    seconds_per_token: list[float] = field(repr=False)
    logprobs: list[TokenLogprob] | None = field(default=None, repr=False)  # one for each token, where they were asked

    @property
    def skip_ratio(self) -> float:
        """Skipped FFN executions over (layers x generated tokens); warm-up and cold layers count."""
        return float(self.skip_map.mean()) if self.skip_map.size else 0.0

    @property
    def unread_ratio(self) -> float:
        """Bytes of FFN weights not read over those of (layers x generated tokens), warm-up included."""
        return float(self.unread_map.mean()) if self.unread_map.size else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decode speed past the first token."""
        rest = self.seconds_per_token[1:]
        return len(rest) / sum(rest) if rest else 0.0


@dataclass(frozen=True)
class StreamChunk:
    """One token of a stream. ``text`` may be empty while a character or a possible stop string is incomplete;
    the last chunk carries the whole ``generation``."""

    text: str
    token_id: int | None
    generation: Generation | None = None
    logprob: TokenLogprob | None = None  # where it was asked
