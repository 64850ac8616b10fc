"""SkipDecode (Del Corro et al. 2023, arXiv 2307.02628): the later a token, the fewer layers it runs.

As published, a token runs the first few layers (``warmup_layers``), then bypasses lower and middle layers and spends
the rest of its depth at the top; the depth falls linearly over the positions, between two bounds. A bypassed layer's
keys and values are those of the state of the last layer that ran. No token ever attends to them: the depth only falls,
so the layers that a token runs were run by all tokens before it. That is the method's point, and a test holds it.

The paper fine-tunes the model for its schedule; here, as for every other method, the model is left as it is.
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
"""Where a schedule begins, from the depth that would do without a fall (0) to the full depth (1)."""


@dataclass(frozen=True)
class DepthSchedule:
    """Layers that each token runs: all in the prompt and in the warm-up, then falling linearly from ``most`` to
    ``fewest`` at the last of ``new_tokens``, and ``fewest`` from there on."""

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
    """Depth that falls with the position."""

    name: ClassVar[str] = "skipdecode"
    source: ClassVar[str] = "SkipDecode (Del Corro et al. 2023, arXiv 2307.02628), without its fine-tuning"
    ratio_of: ClassVar[RatioOf] = "layers"

    def find(self, setup: Setup, ratio: float, alike: Sequence[Passage], progress: Progress = ignore) -> Found:
        """Of several schedules at the wanted ratio, from a slow to the steepest fall, the one closest to the full model
        (mean KL divergence) on ``alike``."""
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
            if abs(measured - ratio) > CLOSE_ENOUGH:  # even the lowest bound is not enough below so high a start
                fewest = floor
                most, _ = match(lambda most: skipped(most, floor), ratio, floor, layers, ignore)
            found.append(schedule(most, fewest))
        return found
