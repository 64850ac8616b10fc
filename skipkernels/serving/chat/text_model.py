"""A language model on this project's engine as a ``ModalityModel``: one modality, a policy for each skip level."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from skipkernels.decoding import Row
from skipkernels.engine import Engine
from skipkernels.errors import PolicyError, RequestError
from skipkernels.policy import Policy
from skipkernels.serving.chat.chat import ChatFormat, Completion
from skipkernels.serving.chat.progress import Progress, progress_of
from skipkernels.serving.chat.text_format import TextFormat, TextPrompt
from skipkernels.serving.strategy import Inputs, Strategy
from skipkernels.text import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Metric = Callable[[str, str], float]
"""(text, expected text) -> score in [0, 1]."""
_TIMED_PROMPT, _TIMED_STEPS, _ROUNDS = 256, 16, 5


def exact_match(text: str, expected: str) -> float:
    """1 for the expected text, white space around it aside."""
    return float(text.strip() == expected.strip())


def shared_prefix(text: str, expected: str) -> float:
    """The share of the expected text up to the first difference."""
    same = next((at for at, pair in enumerate(zip(text, expected, strict=False)) if pair[0] != pair[1]), None)
    length = min(len(text), len(expected)) if same is None else same
    return length / len(expected) if expected else float(not text)


class TextModel:
    """A ``ChatModel``: its inputs are ``TextPrompt``, its outputs ``Completion``.

    Args:
        engine: with a tokenizer; its ``max_batch_size`` is the largest batch.
        policies: by skip level; level 0 is the dense model's.
        metric: what the profile's accuracies mean.
    """

    modalities = ("text",)

    def __init__(self, name: str, engine: Engine, policies: Mapping[float, Policy], metric: Metric) -> None:
        if engine.tokenizer is None:
            raise RequestError(f"{name} has no tokenizer, and chats are text; serve a checkpoint with one")
        for level, policy in policies.items():
            if (policy.plan(engine.config.num_hidden_layers) is None) != (level == 0.0):
                raise PolicyError(f"skip level {level} stands for policy {policy.label}; only level 0 skips nothing")
        self.name = name
        self.device = engine.execution.device
        self.dtype = engine.dtype
        self.strategies = tuple(Strategy(("text",), level) for level in policies)
        written = json.dumps({str(level): policy.to_dict() for level, policy in policies.items()}, sort_keys=True)
        self.fingerprint = f"{engine.fingerprint}-{hashlib.sha256(written.encode()).hexdigest()[:8]}"
        self.format: ChatFormat = TextFormat(engine.tokenizer, engine.max_seq_len, _prefill_share(engine))
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._policies = {strategy: policies[strategy.skip_level] for strategy in self.strategies}
        self._metric = metric

    def run(self, batch: Sequence[Inputs], strategy: Strategy) -> list[Completion]:
        """Decodes the prompts together; each row ends at its own limit, stop string or end of sequence."""
        prompts: list[TextPrompt] = [inputs["text"] for inputs in batch]
        decoding = self._engine.begin(
            [prompt.token_ids for prompt in prompts],
            sampling=[prompt.sampling for prompt in prompts],
            policy=self._policies[strategy],
        )
        eos = frozenset(self._engine.default_eos_token_ids)
        replies = [
            _Reply(row, prompt, progress_of(inputs), self._tokenizer, eos)
            for row, prompt, inputs in zip(decoding.rows, prompts, batch, strict=True)
        ]
        for _ in decoding.steps():
            for reply in replies:
                reply.take()
        ran = self._engine.state.run_map
        return [reply.completion(1.0 - float(ran[reply.index, : reply.tokens].float().mean())) for reply in replies]

    def score(self, output: Completion, expected: str) -> float:
        return self._metric(output.text, expected)


class _Reply:
    """One row's text while it comes."""

    def __init__(
        self,
        row: Row,
        prompt: TextPrompt,
        progress: Progress,
        tokenizer: PreTrainedTokenizerBase,
        eos: frozenset[int],
    ) -> None:
        self.index = row.index
        self.tokens = 0
        self._row = row
        self._limit = prompt.max_new_tokens
        self._progress = progress
        self._eos = eos
        self._text = TextStream(tokenizer, prompt.stop)
        self._ended_by_itself = False
        progress.restart()

    def take(self) -> None:
        """Hands on what the row's new tokens say, and ends it where it has to end."""
        for token in self._row.token_ids[self.tokens :]:
            self.tokens += 1
            if token in self._eos:
                self._ended_by_itself = True
                return
            self._progress.add(self._text.push(token))
            self._ended_by_itself = self._text.stopped
            if self._text.stopped or self.tokens == self._limit:
                self._row.end()
                return
        if self._progress.given_up:
            self._row.end()

    def completion(self, skip_ratio: float) -> Completion:
        self._progress.add(self._text.flush())
        return Completion(
            text=self._text.text,
            finish_reason="stop" if self._ended_by_itself else "length",
            prompt_tokens=self._row.prompt_tokens,
            new_tokens=self.tokens,
            skip_ratio=skip_ratio,
        )


def _prefill_share(engine: Engine) -> float:
    """What a token of the prompt costs, as a share of a new token; measured, dense, batch 1."""
    tokens = min(_TIMED_PROMPT, engine.max_seq_len // 2)
    steps = min(_TIMED_STEPS, engine.max_seq_len - tokens)
    prefills, decodes = [], []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        decoding = engine.begin([[0] * tokens], max_new_tokens=steps, eos_token_ids=())
        began = time.perf_counter()
        decoding.step(steps)
        prefills.append(began - started)
        decodes.append(time.perf_counter() - began)
    return median(prefills) / tokens / (median(decodes) / steps)
