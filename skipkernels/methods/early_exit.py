"""Early exit by confidence (CALM, Schuster et al. 2022, arXiv 2207.07061).

After every layer the final norm and lm_head predict the next token; once the difference of the two highest
probabilities reaches a threshold, the token skips all remaining layers. Their keys and values are computed from its
hidden state at the exit. CALM trains its models to predict at every layer; here the model is not trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError
from skipkernels.methods.layer_decoder import LayerDecoder
from skipkernels.methods.layer_methods import LayerMethod
from skipkernels.methods.lengths import Lengths
from skipkernels.methods.matching import match, skip_ratio
from skipkernels.methods.method import Found, Method, Progress, RatioOf, ignore
from skipkernels.methods.setup import Setup

_LOG_ODDS = 16.0  # of a confidence; above it, fp32 rounds to 1


class ConfidentExit:
    """A token exits once ``confidence`` is reached. The first layer, the prompt and the warm-up always run."""

    def __init__(self, decoder: LayerDecoder, confidence: float, warmup_tokens: int) -> None:
        self._decoder = decoder
        self._confidence = confidence
        self._warmup_tokens = warmup_tokens

    def runs(self, layer: int, hidden: torch.Tensor, ran: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        tested = ran & (step >= self._warmup_tokens)
        if layer == 0 or not tested.any():
            return ran
        runs = ran.clone()
        runs[tested] = confidence(self._decoder, hidden[tested]) < self._confidence
        return runs


def confidence(decoder: LayerDecoder, hidden: torch.Tensor) -> torch.Tensor:
    """The highest minus the second highest probability after hidden [tokens, hidden]: f32 [tokens], in [0, 1]."""
    best = decoder.logits(hidden).softmax(dim=-1).topk(2, dim=-1).values
    return best[:, 0] - best[:, 1]


class EarlyExit:
    """Fewer layers where the model is confident."""

    name: ClassVar[str] = "exit"
    source: ClassVar[str] = "early exit by softmax confidence (CALM, Schuster et al. 2022, arXiv 2207.07061), untrained"
    ratio_of: ClassVar[RatioOf] = "layers"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        lengths, layers = Lengths.of(alike), setup.engine.config.num_hidden_layers
        reachable = ratio / lengths.share_past(ratio, setup.warmup_tokens) * (1 - 1 / layers)
        if ratio > reachable:
            raise PolicyError(
                f"a ratio of {ratio} cannot be reached: the first of {layers} layers and {setup.warmup_tokens} warm-up "
                f"tokens always run, so generations of {lengths.label} skip at most {reachable:.3f}"
            )
        # in log-odds, because confidences may be close to 0 (untrained models) or to 1
        log_odds, _ = match(
            lambda log_odds: skip_ratio(self._method(setup, _probability(log_odds)).score(alike)),
            ratio,
            -_LOG_ODDS,
            _LOG_ODDS,
            progress,
        )
        return {"confidence": _probability(log_odds)}

    def build(self, setup: Setup, found: Found) -> Method:
        return self._method(setup, found["confidence"])

    def _method(self, setup: Setup, threshold: float) -> LayerMethod:
        rule = ConfidentExit(setup.layer_decoder, threshold, setup.warmup_tokens)
        return LayerMethod(setup.engine, setup.layer_decoder, rule, fills_cache=True)


def _probability(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))
