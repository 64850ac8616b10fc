"""Trains the fusion classifier on every modality subset in turn. A curriculum from strong to weak evidence, mostly on a
few frames per segment, keeps it to minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from skipkernels.workloads.fusion.clips import MODALITIES, Clips, ClipSource
from skipkernels.workloads.fusion.network import FusionNetwork, FusionShape

SUBSETS = (("audio", "video"), ("audio",), ("video",))
_BEGIN = 4.0  # factor on the strength of the evidence when training begins
_FEW = 2  # frames of a segment and modality
_CLIPPED = 1.0  # norm of the gradient


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Args:
        steps: one batch of clips and one modality subset each.
        clips: in a batch.
        learning_rate: after ``warmup`` steps, and up to half of them all; then it falls linearly.
        faint_from: share of the steps after which the evidence is as weak as the source's.
        whole_from: share of the steps after which clips have all of their frames.
        dropped_ffns: share of the labels for which an FFN is dropped, except the first and the last FFN: prepares for
            skipping. Like LayerSkip's layer dropout (arXiv 2404.16710), for FFNs.
    """

    steps: int = 480
    clips: int = 16
    learning_rate: float = 2e-3
    warmup: int = 30
    faint_from: float = 0.4
    whole_from: float = 0.9
    dropped_ffns: float = 0.15

    def rate(self, step: int) -> float:
        left = (self.steps - step) / self.steps
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, 2.0 * left)

    def strengthened(self, step: int) -> float:
        """What the evidence is multiplied by."""
        return max(1.0, _BEGIN - (_BEGIN - 1.0) * step / self.steps / self.faint_from)

    def whole(self, step: int) -> bool:
        return step >= self.whole_from * self.steps


def train(
    source: ClipSource,
    schedule: Schedule,
    seed: int,
    shape: Mapping[str, int] | None = None,
    after_step: Callable[[float], None] = lambda loss: None,
) -> FusionNetwork:
    """
    Args:
        shape: fields of ``FusionShape`` that the source does not determine.
        after_step: called with the loss of each step.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    frames = source.segments * sum(source.frames.values())
    network = FusionNetwork(FusionShape(source.segments, frames, **(shape or {})))
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    with _dropping_ffns(network, schedule.dropped_ffns):
        for step in range(schedule.steps):
            subset = SUBSETS[step % len(SUBSETS)]
            taken = source.frames if schedule.whole(step) else dict.fromkeys(MODALITIES, _FEW)
            factor = schedule.strengthened(step)
            strengths = {modality: factor * strength for modality, strength in source.strengths.items()}
            clips = replace(source, strengths=strengths, frames=taken).draw(schedule.clips, rng)
            loss = _loss(network, clips, subset, _positions(source, subset, taken, rng))
            optimizer.param_groups[0]["lr"] = schedule.rate(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), _CLIPPED)
            optimizer.step()
            after_step(loss.item())
    return network


def _loss(network: FusionNetwork, clips: Clips, subset: tuple[str, ...], positions: torch.Tensor) -> torch.Tensor:
    labels = torch.from_numpy(clips.labels)
    logits = network({modality: torch.from_numpy(clips.frames[modality]) for modality in subset}, labels, positions)
    return cross_entropy(logits.flatten(0, 1), network.label_tokens(labels).flatten())


def _positions(
    source: ClipSource, subset: tuple[str, ...], taken: Mapping[str, int], rng: np.random.Generator
) -> torch.Tensor:
    """Position of each token, as if the frames that were drawn were a sample of a whole clip's."""
    positions: list[int] = []
    begin = 0
    for modality in subset:
        frames = source.frames[modality]
        for _ in range(source.segments):
            positions += (begin + np.sort(rng.choice(frames, taken[modality], replace=False))).tolist()
            begin += frames
    return torch.tensor([*positions, *range(begin, begin + source.segments)])  # start, and all labels but the last


@contextmanager
def _dropping_ffns(network: FusionNetwork, share: float) -> Iterator[None]:
    """Drops FFNs between the first and the last for ``share`` of the labels."""

    def drop(ffn: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        kept = torch.ones(output.shape[:2])
        labels = network.shape.segments
        kept[:, -labels:] = (torch.rand(len(kept), labels) >= share).to(kept)
        return output * kept[..., None]

    hooks = [layer.mlp.register_forward_hook(drop) for layer in network.decoder.model.layers[1:-1]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
