"""SkipDecode (Del Corro et al. 2023, arXiv 2307.02628): later tokens run fewer layers.

As published, a token runs the first few layers (``warmup_layers``), skips lower and middle layers, and runs the rest of
its depth at the top; the depth falls linearly with the position, between two bounds. Keys and values of a skipped layer
are computed from the last hidden state before it. No token ever attends to them: the depth only falls, so the layers
that a token runs were run by all earlier tokens. A test checks that.

The paper fine-tunes the model for its schedule; here, as for every other method, the model is not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError
from skipkernels.methods.layer_decoder import EveryLayer
from skipkernels.methods.layer_methods import LayerMethod
from skipkernels.methods.lengths import Lengths
from skipkernels.methods.matching import CLOSE_ENOUGH, match
from skipkernels.methods.method import Found, Method, Progress, RatioOf, ignore
from skipkernels.methods.setup import Setup

_FALLS = (0.25, 0.5, 1.0)
"""Initial depths to try, from the constant depth that gives the ratio (0) to the full depth (1)."""


@dataclass(frozen=True)
class DepthSchedule:
    """Layers that each token runs: all in the prompt and the warm-up; then the number falls linearly from ``most`` to
    ``fewest`` at the last of ``new_tokens``, and stays there."""

    num_layers: int
    most: float
    fewest: float
    new_tokens: int
    warmup_tokens: int
    warmup_layers: int = 1

    def depth(self, step: torch.Tensor) -> torch.Tensor:
        """Layers to run at each step, i64 like ``step``."""
        tokens = max(1, self.new_tokens - self.warmup_tokens)
        progress = ((step - self.warmup_tokens + 0.5) / tokens).clamp(0.0, 1.0)
        falling = (self.most - progress * (self.most - self.fewest) + 0.5).floor().long()
        return torch.where(step < self.warmup_tokens, self.num_layers, falling)

    def runs(self, layer: int, hidden: torch.Tensor, ran: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        at_the_top = self.depth(step) - self.warmup_layers
        return (at_the_top >= self.num_layers - layer) | (layer < self.warmup_layers)


class SkipDecode:
    """Fewer layers at later positions."""

    name: ClassVar[str] = "skipdecode"
    source: ClassVar[str] = "SkipDecode (Del Corro et al. 2023, arXiv 2307.02628), without its fine-tuning"
    ratio_of: ClassVar[RatioOf] = "layers"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        """Tries schedules at the wanted ratio, from flat to steep. Returns the one closest to the full model on
        ``alike``, by mean KL divergence."""
        candidates = self._candidates(setup, ratio, Lengths.of(alike))
        expected = LayerMethod(setup.engine, setup.layer_decoder, EveryLayer(), fills_cache=False).score(
            alike, keep_log_probs=True
        )
        divergences = []
        for number, schedule in enumerate(candidates, start=1):
            readings = self.build(setup, asdict(schedule)).score(alike, reference=expected)
            divergences.append(np.concatenate([reading.kl for reading in readings if reading.kl is not None]).mean())
            progress(f"trying depths {schedule.most:.1f} to {schedule.fewest:.1f}", number / len(candidates))
        return asdict(candidates[int(np.argmin(divergences))])

    def build(self, setup: Setup, found: Found) -> Method:
        return LayerMethod(setup.engine, setup.layer_decoder, DepthSchedule(**found), fills_cache=False)

    def _candidates(self, setup: Setup, ratio: float, lengths: Lengths) -> list[DepthSchedule]:
        """Schedules that skip ``ratio`` in generations of these lengths."""
        layers = setup.engine.config.num_hidden_layers
        floor = float(DepthSchedule.warmup_layers + 1)  # one layer at the top
        steps = torch.from_numpy(lengths.steps)

        def schedule(most: float, fewest: float) -> DepthSchedule:
            return DepthSchedule(layers, most, fewest, lengths.longest, setup.warmup_tokens)

        def skipped(most: float, fewest: float) -> float:
            return 1.0 - float(schedule(most, fewest).depth(steps).double().mean()) / layers

        reachable = skipped(floor, floor)
        if not 0.0 < ratio <= reachable:
            raise PolicyError(
                f"a ratio of {ratio} cannot be reached: SkipDecode runs at least {floor:.0f} of {layers} layers and "
                f"{setup.warmup_tokens} warm-up tokens in full, so generations of {lengths.label} skip at most "
                f"{reachable:.3f}"
            )
        level, _ = match(lambda depth: skipped(depth, depth), ratio, floor, layers, ignore)
        found = []
        for share in _FALLS:
            most = level + share * (layers - level)
            fewest, measured = match(partial(skipped, most), ratio, floor, most, ignore)
            if (
                abs(measured - ratio) > CLOSE_ENOUGH
            ):  # not even the lowest bound gives the ratio with this initial depth
                fewest = floor
                most, _ = match(lambda most: skipped(most, floor), ratio, floor, layers, ignore)
            found.append(schedule(most, fewest))
        return found
