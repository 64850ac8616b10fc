"""SkipDecode (Del Corro et al. 2023, arXiv 2307.02628): the later a token, the fewer layers it runs.

As published, a token runs the first few layers (``warmup_layers``), then bypasses lower and middle layers and spends
the rest of its depth at the top; the depth falls linearly over the positions, between two bounds. A bypassed layer's
keys and values are those of the state of the last layer that ran. No token ever attends to them: the depth only falls,
so the layers that a token runs were run by all tokens before it. That is the method's point, and a test holds it.

The paper fine-tunes the model for its schedule; here, as for every other method, the model is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from skipkernels.errors import PolicyError
from skipkernels.quality.layer_methods import LayerMethod
from skipkernels.quality.lengths import Lengths
from skipkernels.quality.method import Found, Method, Progress, RatioOf, ignore
from skipkernels.quality.setup import Setup

_BISECTIONS = 20


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

    def find(self, setup: Setup, ratio: float, lengths: Lengths, progress: Progress = ignore) -> Found:
        """Bounds that skip the wanted ratio: the full depth and what it takes below it, or, where even the lowest bound
        is not enough below the full depth, a lower first one too."""
        layers = setup.engine.config.num_hidden_layers
        floor = DepthSchedule.warmup_layers + 1  # one layer at the top
        steps = torch.from_numpy(lengths.steps)

        def schedule(most: float, fewest: float) -> DepthSchedule:
            return DepthSchedule(layers, most, fewest, lengths.longest, setup.warmup_tokens)

        def skipped(most: float, fewest: float) -> float:
            return 1.0 - float(schedule(most, fewest).depth(steps).double().mean()) / layers

        reachable = skipped(floor, floor)
        if not 0.0 < ratio <= reachable:
            raise PolicyError(
                f"a ratio of {ratio} cannot be reached: SkipDecode runs at least {floor} of {layers} layers and "
                f"{setup.warmup_tokens} warm-up tokens in full, so generations of {lengths.label} skip at most "
                f"{reachable:.3f}"
            )
        if skipped(layers, floor) >= ratio:
            found = schedule(layers, _bound(lambda fewest: skipped(layers, fewest), ratio, floor, layers))
        else:
            found = schedule(_bound(lambda most: skipped(most, floor), ratio, floor, layers), floor)
        return asdict(found)

    def build(self, setup: Setup, found: Found) -> Method:
        return LayerMethod(setup.engine, setup.layer_decoder, DepthSchedule(**found), fills_cache=False)


def _bound(skipped: Callable[[float], float], ratio: float, low: float, high: float) -> float:
    """The highest bound that skips at least ``ratio``, or the one just above it where that is closer."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if skipped(middle) >= ratio else (low, middle)
    return min(low, high, key=lambda bound: abs(skipped(bound) - ratio))
