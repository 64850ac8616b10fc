"""The fine grain of skipping: thresholds below which single neurons of an FFN are left out.

For one token at layer l with thresholds a_l, b_l (0 keeps all) and scales s_j (1 where a policy has none),
n = rms_norm(h):

    g = act(gate_proj n)                          every neuron: a third of the FFN's bytes is always read
    kept_up = {j : |g_j| >= a_l / s_j}            CATS, arXiv 2404.08763, is all s_j = 1
    m_j = g_j * (up_proj_j . n), j in kept_up
    kept_down = {j in kept_up : |m_j| >= b_l}     TEAL, arXiv 2408.14690
    f = sum over kept_down of m_j * down_proj[:, j]

With experts the rule is applied to each expert that the token's router chose, with the layer's thresholds and all
s_j = 1: a third of the chosen experts' bytes is always read, and the router.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

from skipkernels.errors import PolicyError
from skipkernels.skipping.up_scales import UpScales


@dataclass(frozen=True, kw_only=True)
class NeuronRule:
    """What a policy holds beside its rule for whole FFNs.

    Args:
        gate_thresholds: one per layer; a neuron whose activated gate is smaller in magnitude is left out of up_proj and
            down_proj. Empty: all 0.
        product_thresholds: one per layer; a neuron whose product of gate and up is smaller is left out of down_proj.
            Empty: all 0. Both empty: the policy has no rule for neurons.
        up_scales: [layers][intermediate], how large each neuron's output of up_proj is, rounded to float16. A neuron's
            gate threshold is its layer's divided by its own scale, in fp32. Empty: all 1.
    """

    gate_thresholds: tuple[float, ...] = ()
    product_thresholds: tuple[float, ...] = ()
    up_scales: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    _scales: ClassVar[UpScales | None] = None  # the same, of this instance

    @property
    def has_neuron_rule(self) -> bool:
        return bool(self.gate_thresholds or self.product_thresholds)

    def check_neuron_rule(self) -> None:
        """
        Raises:
            PolicyError: a threshold is no finite number of at least 0, a scale no number above 0, or the lists differ
                in length.
        """
        for name in ("gate_thresholds", "product_thresholds", "up_scales"):
            if isinstance(given := getattr(self, name), str) or not hasattr(given, "__len__"):
                raise PolicyError(f"{name} must be a list with an entry per layer, got {given!r}")
        for name in ("gate_thresholds", "product_thresholds"):
            for layer, value in enumerate(getattr(self, name)):
                if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < math.inf:
                    raise PolicyError(f"{name}[{layer}] must be a finite number of at least 0, got {value!r}")
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        gate, product = len(self.gate_thresholds), len(self.product_thresholds)
        if gate and product and gate != product:
            raise PolicyError(f"gate_thresholds has {gate} entries, product_thresholds {product}; give one per layer")
        self._check_scales()

    def _check_scales(self) -> None:
        given = self.up_scales
        scales = UpScales.of(given) if len(given) else None
        object.__setattr__(self, "_scales", scales)  # kept for every plan: there are many
        object.__setattr__(self, "up_scales", tuple(map(tuple, scales.values.tolist())) if scales else ())
        if scales and scales.shape[0] != len(self.gate_thresholds):
            raise PolicyError(
                f"up_scales has {scales.shape[0]} layers, gate_thresholds {len(self.gate_thresholds)}; scales go with "
                "gate thresholds, one list per layer"
            )

    def neuron_plan(self, num_layers: int, target_ratio: float = 0.0, ramp_tokens: int = 0) -> NeuronPlan | None:
        """The thresholds of every layer; None: no rule for neurons.

        Raises:
            PolicyError: they are those of a model of another depth.
        """
        for name in ("gate_thresholds", "product_thresholds"):
            values = getattr(self, name)
            if values and len(values) != num_layers:
                raise PolicyError(f"{name} has {len(values)} entries, the model {num_layers} layers")
        if not self.has_neuron_rule:
            return None
        zeros = (0.0,) * num_layers
        return NeuronPlan(
            self.gate_thresholds or zeros,
            self.product_thresholds or zeros,
            target_ratio,
            ramp_tokens,
            self._scales,
        )

    def reachable_neuron_ratio(self, num_layers: int) -> float:
        """The share of FFN bytes that is not read when every threshold that is not 0 leaves out all it can: a gate
        threshold two thirds of its layer, a product threshold alone one third."""
        gates = self.gate_thresholds or (0.0,) * num_layers
        products = self.product_thresholds or (0.0,) * num_layers
        thirds = sum(2 if gate else 1 if product else 0 for gate, product in zip(gates, products, strict=True))
        return thirds / (3 * num_layers)


@dataclass(frozen=True)
class NeuronPlan:
    """Thresholds of every layer, and the share of FFN bytes a row's factor on them holds from ``ramp_tokens`` generated
    tokens on (0: the factor stays 1)."""

    gate_thresholds: tuple[float, ...]
    product_thresholds: tuple[float, ...]
    target_ratio: float = 0.0
    ramp_tokens: int = 0
    up_scales: UpScales | None = None

    def reachable(self, shares: Sequence[Sequence[float]]) -> float:
        """The share of FFN bytes that is not read when every threshold that is not 0 leaves out all it can, of weights
        of whose bytes all neurons of up_proj and of down_proj take ``shares`` of a layer (``neuron_shares``)."""
        layers = zip(self.gate_thresholds, self.product_thresholds, shares, strict=True)
        unread = [up + down if gate else down if product else 0.0 for gate, product, (up, down) in layers]
        return sum(unread) / len(unread)

    def check_neurons(self, intermediate_size: int | None, shares: Sequence[Sequence[float]] | None = None) -> None:
        """
        Args:
            intermediate_size: None: a model with experts.
            shares: see ``reachable``; None: they are not known yet.

        Raises:
            PolicyError: the scales are those of a model of another width, or the target is beyond the weights' reach.
        """
        if self.up_scales and intermediate_size is None:
            raise PolicyError(
                f"up_scales has {self.up_scales.shape[1]} entries per layer, but this model has experts, whose neurons "
                "share their layer's thresholds; leave up_scales empty"
            )
        if shares is not None and self.target_ratio and self.target_ratio >= (reachable := self.reachable(shares)):
            raise PolicyError(
                f"target_ratio {self.target_ratio:g} cannot be held: the thresholds that are not 0 can leave out less "
                f"than {reachable:.3f} of the FFN bytes of these weights; what neurons share, gate_proj and the scales "
                "of quantised blocks, is always read"
            )
        if self.up_scales and self.up_scales.shape[1] != intermediate_size:
            given = self.up_scales.shape[1]
            raise PolicyError(
                f"up_scales has {given} entries per layer, the model's FFNs have {intermediate_size} neurons"
            )
