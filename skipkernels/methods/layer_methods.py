"""LayerMethod: a method that skips whole layers; runs on the reference path, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from skipkernels.calibration.passages import Passage
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.methods.layer_decoder import LayerDecoder, LayerRule
from skipkernels.methods.method import Answer, OnItem, Reading, ignore
from skipkernels.methods.work import Work
from skipkernels.model.text import TextStream


class LayerMethod:
    """Decodes under a rule.

    Args:
        engine: its tokenizer and end-of-sequence tokens are used.
        fills_cache: whether an optimised decoder would have to compute keys and values of skipped layers, because later
            tokens attend to them. Their bytes then do not count as saved.
    """

    def __init__(self, engine: Engine, decoder: LayerDecoder, rule: LayerRule, *, fills_cache: bool) -> None:
        self._engine = engine
        self._decoder = decoder
        self._rule = rule
        self._fills_cache = fills_cache

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        eos_token_ids: Sequence[int] | None = None,
        on_item: OnItem = ignore,
    ) -> list[Answer]:
        eos = self._engine.default_eos_token_ids if eos_token_ids is None else eos_token_ids
        answers = []
        for prompt in prompts:
            answers.append(self._continue(list(prompt), max_new_tokens, stop, set(eos)))
            on_item(1)
        return answers

    def score(
        self,
        passages: Sequence[Passage],
        *,
        reference: Sequence[Reading] | None = None,
        keep_log_probs: bool = False,
        on_item: OnItem = ignore,
    ) -> list[Reading]:
        readings = []
        for number, passage in enumerate(passages):
            expected = None if reference is None else reference[number].all_log_probs
            readings.append(self._read(passage, expected, keep_log_probs))
            on_item(1)
        return readings

    def _continue(self, prompt: list[int], max_new_tokens: int, stop: Sequence[str], eos: set[int]) -> Answer:
        if not prompt or len(prompt) + max_new_tokens - 1 > self._decoder.max_seq_len:
            raise RequestError(
                f"{len(prompt)} prompt tokens and max_new_tokens={max_new_tokens} do not fit "
                f"max_seq_len={self._decoder.max_seq_len}"
            )
        text = None if self._engine.tokenizer is None else TextStream(self._engine.tokenizer, stop)
        token_ids: list[int] = []
        maps = []
        self._decoder.begin()
        tokens = torch.tensor(prompt)
        for step in range(max_new_tokens):
            hidden, ran = self._decoder.read(tokens, self._rule, step - len(tokens) + 1)
            maps.append(ran[-1:])
            token_ids.append(int(self._decoder.logits(hidden[-1:]).argmax()))
            if token_ids[-1] in eos:
                break
            if text is not None:
                text.push(token_ids[-1])
                if text.stopped:
                    break
            tokens = torch.tensor(token_ids[-1:])
        if text is not None:
            text.flush()
        return Answer(token_ids, text.text if text else "", self._work(torch.cat(maps)))

    def _read(self, passage: Passage, expected: torch.Tensor | None, keep_log_probs: bool) -> Reading:
        if passage.prompt_tokens < 1 or passage.decoded_tokens < 1:
            raise RequestError(
                f"a passage needs at least one prompt token and one token to predict, got {passage.prompt_tokens} and "
                f"{passage.decoded_tokens}"
            )
        if len(passage.token_ids) - 1 > self._decoder.max_seq_len:
            raise RequestError(
                f"a passage of {len(passage.token_ids)} tokens does not fit max_seq_len={self._decoder.max_seq_len}"
            )
        given = passage.prompt_tokens - 1
        tokens = torch.tensor(passage.token_ids)
        self._decoder.begin()
        hidden, ran = self._decoder.read(tokens[:-1], self._rule, -given)
        log_probs = self._decoder.logits(hidden[given:]).log_softmax(dim=-1).cpu()
        targets = tokens[given + 1 :, None]
        kl = None if expected is None else (expected.exp() * (expected - log_probs)).sum(dim=-1).numpy()
        return Reading(
            argmax=log_probs.argmax(dim=-1).numpy(),
            log_probs=log_probs.gather(1, targets)[:, 0].numpy(),
            kl=kl,
            all_log_probs=log_probs if keep_log_probs else None,
            work=self._work(ran[given:]),
        )

    def _work(self, ran: torch.Tensor) -> Work:
        skipped = np.logical_not(ran.cpu().numpy())
        return Work.of_layers(self._engine.config, self._engine.weights, skipped, fills_cache=self._fills_cache)
