"""The fusion classifier as a ``ModalityModel``: its decoder runs on this project's engine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from skipkernels.chat.skip_levels import policies_of_levels
from skipkernels.chat.text_model import check_policies, policies_hash
from skipkernels.engine import Engine
from skipkernels.modality.job import Request
from skipkernels.modality.profiler import Sample
from skipkernels.modality.strategy import Inputs, Strategy, all_strategies
from skipkernels.model.matrix import float_tensor
from skipkernels.model.prompt import EmbeddedPrompt
from skipkernels.skipping.policy import Policy, SkipPolicy
from skipkernels.workloads.fusion.clips import MODALITIES, Clips
from skipkernels.workloads.fusion.network import PLACEHOLDERS, START, FusionNetwork, label_of

SKIP_RULE = SkipPolicy(threshold=0.9, span=3, first_dense_layers=1, last_dense_layers=1, warmup_tokens=1)
"""Parameters of all skip levels; each level holds its own ratio."""


@dataclass(frozen=True)
class Prediction:
    """The predicted labels of a clip's segments."""

    labels: tuple[int | None, ...]  # None: the decoded token is not a label of that segment
    skip_ratio: float  # of the FFNs of the decoded labels


class FusionModel:
    """A ``ModalityModel``. Its inputs are frames, f32 [segments, frames, FEATURES]. Modalities that a strategy leaves
    out are not encoded and have no tokens in the prompt.

    Args:
        network: its decoder's weights are shared with the engine.
        skip_levels: skip ratios to hold while labels are decoded; each is a strategy with every modality subset; 0 is
            dense.
        options: of ``Engine.from_pretrained``; its ``max_batch_size`` is the largest batch.

    Raises:
        PolicyError, RequestError, DeviceError: as from the engine.
    """

    name = "fusion"
    modalities: tuple[str, ...] = MODALITIES

    def __init__(self, network: FusionNetwork, skip_levels: Sequence[float] = (0.0,), **options: Any) -> None:
        policies: Mapping[float, Policy] = policies_of_levels(SKIP_RULE, skip_levels)
        check_policies(policies, network.shape.layers)
        self._network = network.eval()
        self._policies = dict(policies)
        self.engine = Engine.from_pretrained(network.decoder, **options)
        self.device = self.engine.execution.device
        self.dtype = self.engine.dtype
        self.strategies = all_strategies(MODALITIES, tuple(policies))
        self.fingerprint = f"{self.engine.fingerprint}-{_encoders_hash(network)}-{policies_hash(policies)}"

    def run(self, batch: Sequence[Inputs], strategy: Strategy) -> list[Prediction]:
        """Encodes the modalities that ``strategy`` keeps, then decodes the labels of all clips as a batch, greedily."""
        prompts = [self.prompt(inputs, strategy) for inputs in batch]
        segments = self._network.shape.segments
        policy = self._policies[strategy.skip_level]
        generations = self.engine.generate(prompts, max_new_tokens=segments, eos_token_ids=(), policy=policy)
        return [
            Prediction(
                tuple(label_of(token, segment) for segment, token in enumerate(generation.token_ids)),
                generation.skip_ratio,
            )
            for generation in generations
        ]

    @torch.inference_mode()
    def prompt(self, inputs: Inputs, strategy: Strategy) -> EmbeddedPrompt:
        """The decoder's input for one request."""
        token_ids: list[int] = []
        embeddings = []
        for modality in MODALITIES:
            if modality in strategy.modalities:
                encoded = self._network.encode(modality, torch.from_numpy(inputs[modality])[None])[0]
                token_ids += [PLACEHOLDERS[modality]] * len(encoded)
                embeddings.append(encoded)
        table = float_tensor(self.engine.weights.embed_tokens)
        embeddings.append(table[START : START + 1])
        embedded = torch.cat([one.to(table) for one in embeddings])
        return EmbeddedPrompt([*token_ids, START], embedded)

    def score(self, output: Prediction, expected: Sequence[int]) -> float:
        """The share of a clip's segments that are labelled correctly."""
        return float(np.mean([label == right for label, right in zip(output.labels, expected, strict=True)]))


def samples_of(clips: Clips) -> list[Sample]:
    """Each clip with its labels."""
    return [
        Sample({modality: clips.frames[modality][index] for modality in MODALITIES}, tuple(clips.labels[index]))
        for index in range(len(clips))
    ]


def request_of(sample: Sample) -> Request:
    return Request(sample.inputs)


def _encoders_hash(network: FusionNetwork) -> str:
    """Eight hex digits over all weights outside the decoder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if not name.startswith("decoder."):
            digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]
