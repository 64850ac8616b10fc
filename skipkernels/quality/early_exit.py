"""Early exit by confidence (CALM, Schuster et al. 2022, arXiv 2207.07061).

Behind every layer the final norm and lm_head predict the next token; once the difference of the two highest
probabilities reaches a threshold, the token skips all layers above. Their keys and values are computed from the state
that it left with. CALM's models are trained to predict at every layer; here the model is left as it is.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import torch

from skipkernels.errors import PolicyError
from skipkernels.quality.layer_decoder import LayerDecoder
from skipkernels.quality.layer_methods import LayerMethod
from skipkernels.quality.lengths import Lengths
from skipkernels.quality.method import Found, Method, Progress, RatioOf, ignore
from skipkernels.quality.setup import Setup

_BISECTIONS = 16
_CLOSE_ENOUGH = 0.003
_LOG_ODDS = 16.0  # of a confidence: fp32 tells it from 1 up to here


class ConfidentExit:
    """A token runs no layer any more once ``confidence`` is reached; the first layer, prompt and warm-up always run."""

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
    """Depth that falls where the model is sure."""

    name: ClassVar[str] = "exit"
    source: ClassVar[str] = "early exit by softmax confidence (CALM, Schuster et al. 2022, arXiv 2207.07061), untrained"
    ratio_of: ClassVar[RatioOf] = "layers"

    def find(self, setup: Setup, ratio: float, lengths: Lengths, progress: Progress = ignore) -> Found:
        """Bisects the threshold, each one measured by decoding the calibration text."""
        wanted = lengths.share_past(ratio, setup.warmup_tokens)
        layers = setup.engine.config.num_hidden_layers
        if wanted > 1 - 1 / layers:
            raise PolicyError(
                f"a ratio of {ratio} cannot be reached: the first of {layers} layers and {setup.warmup_tokens} warm-up "
                f"tokens always run, so generations of {lengths.label} skip at most "
                f"{ratio / wanted * (1 - 1 / layers):.3f}"
            )
        new_tokens = max(lengths.typical, setup.warmup_tokens + 1)
        passages = setup.search_passages(new_tokens)
        past_warmup = 1 - setup.warmup_tokens / new_tokens

        def skipped(threshold: float) -> float:
            readings = self._method(setup, threshold).score(passages)
            return float(np.mean([reading.work.ffn_skip_ratio for reading in readings])) / past_warmup

        # in log-odds, because untrained models are hardly ever sure, and trained ones often nearly certain
        low, high = -_LOG_ODDS, _LOG_ODDS  # skips too much, too little
        measured: dict[float, float] = {}
        for run in range(_BISECTIONS):
            middle = (low + high) / 2
            threshold = 1.0 / (1.0 + math.exp(-middle))
            measured[threshold] = skipped(threshold)
            progress(f"trying confidence {threshold:.6f}", (run + 1) / _BISECTIONS)
            if abs(measured[threshold] - wanted) <= _CLOSE_ENOUGH:
                break
            low, high = (middle, high) if measured[threshold] > wanted else (low, middle)
        best = min(measured, key=lambda threshold: abs(measured[threshold] - wanted))
        return {"confidence": best}

    def build(self, setup: Setup, found: Found) -> Method:
        return self._method(setup, found["confidence"])

    def _method(self, setup: Setup, threshold: float) -> LayerMethod:
        rule = ConfidentExit(setup.layer_decoder, threshold, setup.warmup_tokens)
        return LayerMethod(setup.engine, setup.layer_decoder, rule, fills_cache=True)
