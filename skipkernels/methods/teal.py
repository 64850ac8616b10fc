"""TEAL (Liu et al. 2024, arXiv 2408.14690): small entries of a matrix's input are dropped, and with them its columns.

Here on the FFN's matrices alone, as all methods in one table leave out FFN bytes, and with the same share of every
layer (the paper's greedy allotment over layers left out). It runs on the reference path: no kernel reads columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch

from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError
from skipkernels.methods.layer_decoder import EveryLayer, LayerDecoder, LayerRule
from skipkernels.methods.layer_methods import LayerMethod
from skipkernels.methods.lengths import Lengths
from skipkernels.methods.method import Found, Method, Progress, RatioOf, ignore
from skipkernels.methods.setup import Setup
from skipkernels.methods.work import Work

_CORRECTIONS = 2  # what is dropped shifts later inputs: the share is corrected by what was measured


class ColumnDecoder(LayerDecoder):
    """Drops inputs below thresholds, ``thresholds[layer]`` of the FFN's input and of down_proj's, from the generated
    token ``warmup_tokens`` on."""

    def __init__(self, setup: Setup, thresholds: Sequence[tuple[float, float]]) -> None:
        engine = setup.engine
        super().__init__(engine.config, engine.weights, engine.max_seq_len)
        self._thresholds = thresholds
        self._warmup_tokens = setup.warmup_tokens
        self._steps = torch.empty(0)
        self._kept: list[torch.Tensor] = []  # share of the inputs, per layer and matrix [tokens]

    def _read_chunk(
        self, tokens: torch.Tensor, rule: LayerRule, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place of which layers ran: the share of each FFN's bytes that was read."""
        self._steps, self._kept = steps, []
        hidden, _ = super()._read_chunk(tokens, rule, steps)
        read = [(2 * ffn + down) / 3 for ffn, down in zip(self._kept[::2], self._kept[1::2], strict=True)]
        return hidden, torch.stack(read, dim=1)

    def _ffn_input(self, x: torch.Tensor) -> torch.Tensor:
        return self._large(x, self._thresholds[len(self._kept) // 2][0])

    def _down_input(self, x: torch.Tensor) -> torch.Tensor:
        return self._large(x, self._thresholds[len(self._kept) // 2][1])

    def _large(self, x: torch.Tensor, threshold: float) -> torch.Tensor:
        kept = (x.abs() >= threshold) | (self._steps < self._warmup_tokens)[:, None]
        self._kept.append(kept.float().mean(dim=-1))
        return x.where(kept, 0)


class _Recorder(LayerDecoder):
    """Keeps samples of the magnitudes that ``ColumnDecoder`` compares, in the order of its thresholds."""

    def __init__(self, setup: Setup) -> None:
        engine = setup.engine
        super().__init__(engine.config, engine.weights, engine.max_seq_len)
        self.samples: list[torch.Tensor] = []

    def _ffn_input(self, x: torch.Tensor) -> torch.Tensor:
        self.samples.append(x[::4].abs().flatten())
        return x

    _down_input = _ffn_input


class ColumnMethod(LayerMethod):
    def _work(self, ran: torch.Tensor) -> Work:
        return Work.of_ffns(self._engine.weights, (1.0 - ran.cpu()).numpy().astype(np.float32))


class TealSkip:
    """The same share of every matrix's columns."""

    name: ClassVar[str] = "teal"
    source: ClassVar[str] = "TEAL (Liu et al. 2024, arXiv 2408.14690), on the FFN, without its greedy allotment"
    ratio_of: ClassVar[RatioOf] = "FFN bytes"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        share = Lengths.of(alike).share_past(ratio, setup.warmup_tokens)
        samples = _magnitudes(setup)
        found: Found = {}
        for number in range(1 + _CORRECTIONS):
            if not 0.0 < share < 1.0:
                raise PolicyError(f"a ratio of {ratio} cannot be reached by columns")
            cuts = [float(np.quantile(values, share)) for values in samples]
            found = {"thresholds": list(zip(cuts[::2], cuts[1::2], strict=True))}
            work = sum((reading.work for reading in self.build(setup, found).score(alike)), Work())
            share += ratio - work.ffn_skip_ratio
            progress(f"matching the ratio: {work.ffn_skip_ratio:.1%}", (number + 1) / (1 + _CORRECTIONS))
        return found

    def build(self, setup: Setup, found: Found) -> Method:
        decoder = ColumnDecoder(setup, [(a, b) for a, b in found["thresholds"]])
        return ColumnMethod(setup.engine, decoder, EveryLayer(), fills_cache=False)


def _magnitudes(setup: Setup) -> list[np.ndarray]:
    """Of the FFN's input and of down_proj's, of each layer in turn."""
    recorder, parts = _Recorder(setup), []
    for passage in setup.text_passages:
        recorder.begin()
        recorder.samples = []
        recorder.read(torch.tensor(passage.token_ids), EveryLayer(), 0)
        parts.append(recorder.samples)
    return [torch.cat(same).numpy() for same in zip(*parts, strict=True)]
