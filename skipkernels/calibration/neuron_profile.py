"""What leaving out neurons of each layer saves and costs, measured once, and thresholds for any saving from it.

Leaving out a product m of layer l costs about (k_l m)^2 nats; k_l comes from what its smaller half costs. So product
thresholds b_l = t / k_l make what the last byte costs the same in every layer: as far as costs add up, no others cost
less at their saving. Before up_proj is read, a product is expected to be |g_j| s_j, with s_j the root mean square of
the neuron's up; that is what gate thresholds a_l = split b_l are compared with. One s for a whole layer costs an eighth
more nats on SmolLM2 at 24 % of the bytes, a third more at 40 %; a model with experts has to do with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from skipkernels.calibration.forced_reading import (
    NOBODY,
    Others,
    Reading,
    divergence,
    divergence_without,
    for_torch,
    read_dense,
)
from skipkernels.calibration.passages import Passage
from skipkernels.engine import Engine
from skipkernels.model.weights import ModelWeights
from skipkernels.skipping.policy import NeuronPolicy
from skipkernels.skipping.up_scales import UpScales

_SAMPLES = 1 << 19  # gates and products kept per layer
_PROBED_PASSAGES = 3
_PROBED_SHARE = 0.5  # of a layer's products; less would drown in the rounding of bf16
_BISECTIONS = 30


@dataclass(frozen=True)
class NeuronProfile:
    """Of one model on one text. ``gates`` and ``products`` are magnitudes at sampled positions, per layer
    f32 [samples, neurons], paired; where single neurons cannot be left out there are none."""

    gates: list[torch.Tensor]
    products: list[torch.Tensor]
    up_scales: UpScales | None  # root mean square of each neuron's up, as a policy file stores it; None: of experts
    sensitivity: list[float]  # k_l
    block_kl: npt.NDArray[np.float32]  # [positions, layers], KL where the FFN of one layer alone is left out
    similarities: npt.NDArray[np.float32]  # [positions, layers], dense, at the same positions
    neuron_shares: torch.Tensor = field(default_factory=lambda: torch.full((1, 2), 1 / 3))
    """Of each layer's FFN bytes, what all neurons of up_proj and of down_proj take; of floats a third each."""
    up_rms: tuple[float, ...] = ()
    """Root mean square of all ups of each layer, where its neurons have no scales of their own."""

    @property
    def layers(self) -> int:
        return self.block_kl.shape[1]

    @property
    def most(self) -> float:
        """The share of the FFN bytes that no neurons at all would leave unread."""
        return float(self.neuron_shares.sum(-1).mean())

    @cached_property
    def scaled_gates(self) -> list[torch.Tensor]:
        """What gate thresholds are compared with."""
        if self.up_scales is None:
            return self.gates
        scales = self.up_scales.values.astype(np.float32)
        return [gate * torch.from_numpy(scale) for gate, scale in zip(self.gates, scales, strict=True)]

    @cached_property
    def listed_scales(self) -> tuple[tuple[float, ...], ...]:
        """For ``NeuronRule.up_scales``."""
        return () if self.up_scales is None else tuple(map(tuple, self.up_scales.values.tolist()))

    def thresholds(
        self, saving: float, split: float, pause: Callable[[], None] = NOBODY.wait
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Of gates and of products, one per layer, that leave ``saving`` of the FFN bytes unread on this text.
        ``pause`` is called for every layer of every trial."""
        low, high = (math.log(bound * min(self.sensitivity)) for bound in (1e-9, 1e9))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            unread = self.unread(*self._at(middle, split), pause)
            low, high = (low, middle) if unread > saving else (middle, high)
        return self._at(low, split)

    def _at(self, log_t: float, split: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        products = [math.exp(log_t) / k for k in self.sensitivity]
        of_layers = self.up_rms or (1.0,) * len(products)
        return tuple(split * b / rms for b, rms in zip(products, of_layers, strict=True)), tuple(products)

    def unread(
        self,
        gate_thresholds: Sequence[float],
        product_thresholds: Sequence[float],
        pause: Callable[[], None] = NOBODY.wait,
    ) -> float:
        """The share of FFN bytes that thresholds leave unread on this text, with the scales; gate_proj is always
        read."""
        left_out = []
        layers = zip(self.scaled_gates, self.products, gate_thresholds, product_thresholds, strict=True)
        for gate, product, a, b in layers:
            pause()
            up = gate >= a
            down = up & (product >= b)
            left_out.append([1 - float(up.float().mean()), 1 - float(down.float().mean())])
        return float((torch.tensor(left_out) * self.neuron_shares).sum(-1).mean())

    def policy(
        self, saving: float, split: float, warmup_tokens: int, pause: Callable[[], None] = NOBODY.wait
    ) -> NeuronPolicy:
        gates, products = self.thresholds(saving, split, pause)
        return NeuronPolicy(
            gate_thresholds=tuple(map(_rounded, gates)),
            product_thresholds=tuple(map(_rounded, products)),
            up_scales=self.listed_scales,
            warmup_tokens=warmup_tokens,
        )

    def uniform_gates(self, saving: float, warmup_tokens: int) -> NeuronPolicy:
        """CATS (arXiv 2404.08763): the same share of every layer's gates."""
        share = min(1.0, saving / self.most)
        gates = tuple(_rounded(_quantile(gate.flatten(), share)) for gate in self.gates)
        return NeuronPolicy(gate_thresholds=gates, warmup_tokens=warmup_tokens)


def profile_neurons(
    engine: Engine,
    passages: Sequence[Passage],
    on_layer: Callable[[int], None] = lambda layers: None,
    others: Others = NOBODY,
) -> NeuronProfile:
    """Reads ``passages``, and some of them again with one layer changed at a time; ``on_layer`` is called with 1 for
    each of these."""
    weights = for_torch(engine.weights, others.wait)
    if engine.no_neurons:
        return _profile_blocks(engine, passages[:_PROBED_PASSAGES], on_layer, weights, others)
    config, layers = engine.config, engine.config.num_hidden_layers
    gates: list[list[torch.Tensor]] = [[] for _ in range(layers)]
    products: list[list[torch.Tensor]] = [[] for _ in range(layers)]
    squares = [np.zeros(config.neurons_of(layer)) for layer in range(layers)]
    positions = sum(passage.decoded_tokens - 1 for passage in passages)
    step = max(1, math.ceil(positions * max(map(len, squares)) / _SAMPLES))
    readings: list[Reading] = []
    for passage in passages:
        acting = slice(passage.prompt_tokens, None)

        def record(layer: int, gate: torch.Tensor, up: torch.Tensor, acting: slice = acting) -> torch.Tensor:
            whole = gate * up
            squares[layer] += up[acting].float().square().sum(0).cpu().numpy()
            gates[layer].append(gate[acting][::step].abs().float().cpu())
            products[layer].append(whole[acting][::step].abs().float().cpu())
            return whole

        reading = read_dense(engine, passage, record, weights, others)
        if len(readings) < _PROBED_PASSAGES:
            readings.append(reading)
    all_gates, all_products = [torch.cat(part) for part in gates], [torch.cat(part) for part in products]
    sensitivity, block_kl = [], []
    for layer in range(layers):
        others.wait()
        half = _SmallLeftOut(_quantile(all_products[layer].flatten(), _PROBED_SHARE))
        cost, alone = [], []
        for reading in readings:
            half.prompt_tokens = reading.passage.prompt_tokens
            cost.append(divergence(engine, reading, layer, half, others)[1:])
            alone.append(divergence_without(engine, reading, layer, others)[1:])
            on_layer(1)
        energy = max(half.energy / sum(map(len, cost)), 1e-12)
        sensitivity.append(math.sqrt(max(float(torch.cat(cost).mean()), 1e-12) / energy))
        block_kl.append(torch.cat(alone).numpy())
    up_rms = [np.sqrt(layer / positions) for layer in squares]
    of_experts = bool(config.num_experts)  # whose neurons are others for every token
    of_layers = (max(float(np.sqrt(np.square(layer).mean())), 1e-12) for layer in up_rms)
    return NeuronProfile(
        gates=all_gates,
        products=all_products,
        up_scales=None if of_experts else _scales(np.stack(up_rms)),
        up_rms=tuple(of_layers) if of_experts else (),
        sensitivity=sensitivity,
        block_kl=np.stack(block_kl, axis=1),
        similarities=torch.cat([reading.similarities[1:] for reading in readings]).numpy(),
        neuron_shares=engine.weights.neuron_shares(),
    )


def _profile_blocks(
    engine: Engine,
    passages: Sequence[Passage],
    on_layer: Callable[[int], None],
    weights: ModelWeights,
    others: Others,
) -> NeuronProfile:
    """Where single neurons cannot be left out: what leaving out whole FFNs costs."""
    readings = [read_dense(engine, passage, weights=weights, others=others) for passage in passages]
    block_kl, layers = [], engine.config.num_hidden_layers
    for layer in range(layers):
        alone = []
        for reading in readings:
            alone.append(divergence_without(engine, reading, layer, others)[1:])
            on_layer(1)
        block_kl.append(torch.cat(alone).numpy())
    return NeuronProfile(
        gates=[],
        products=[],
        up_scales=None,
        sensitivity=[],
        block_kl=np.stack(block_kl, axis=1),
        similarities=torch.cat([reading.similarities[1:] for reading in readings]).numpy(),
        neuron_shares=torch.zeros(layers, 2),
    )


class _SmallLeftOut:
    """Products below a threshold are left out past the prompt; ``energy`` sums up their squares."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self.prompt_tokens = 0
        self.energy = 0.0

    def __call__(self, layer: int, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        products = gate * up
        small = products.abs() < self._threshold
        small[: self.prompt_tokens] = False
        self.energy += float(products[small].float().square().sum())
        return products.masked_fill(small, 0)


def probes(passages: Sequence[Passage], layers: int) -> int:
    """How often ``profile_neurons`` calls ``on_layer``."""
    return layers * min(len(passages), _PROBED_PASSAGES)


def _scales(up_rms: npt.NDArray[np.float64]) -> UpScales:
    """In float16, where a neuron that is never used still has a scale above 0."""
    stored = np.finfo(np.float16)
    return UpScales.of(up_rms.clip(stored.tiny, stored.max))  # type: ignore[arg-type]


def _quantile(values: torch.Tensor, share: float) -> float:
    return float(values.kthvalue(max(1, min(len(values), round(share * len(values)) + 1))).values)


def _rounded(threshold: float) -> float:
    return float(f"{threshold:.6g}")
