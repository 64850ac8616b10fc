"""What of an FFN a token may leave out: whole blocks by FFN-SkipLLM's rule (EMNLP 2024, arXiv 2404.03865), single
neurons (``neuron_rule``), both, and the baselines beside them.

A policy is pure data. ``plan(num_layers)`` lowers it to the parameters of the program's instructions; nothing here
knows of tensors or devices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import ClassVar, Literal

from skipkernels.errors import PolicyError
from skipkernels.skipping.neuron_rule import NeuronPlan, NeuronRule
from skipkernels.skipping.old_names import with_old_names
from skipkernels.skipping.up_scales import UpScales

BatchRule = Literal["per_row", "all", "majority"]
BATCH_RULES: tuple[BatchRule, ...] = ("per_row", "all", "majority")
GateMode = Literal["similarity", "fixed", "random"]
GATE_MODES: tuple[GateMode, ...] = ("similarity", "fixed", "random")
RAMP_TOKENS = 64
"""Generated tokens by which a held skip ratio should have reached its target."""
UNLIMITED_SPAN = 1 << 30  # more layers than any model has: a skip ends at the last dense layers only


@dataclass(frozen=True)
class GatePlan:
    """What a policy asks of the instructions of one program.

    ``gated_layers`` are the layers whose FFN may be skipped; a gate stands in front of each; none: the policy has no
    rule for blocks. ``neurons`` is the rule for neurons, where there is one. In mode ``similarity`` a
    gate tests the similarity that ``down_proj_add`` measured across the layer before it (``tested_layers``).
    ``thresholds[layer]`` is compared with the similarity of that layer.
    """

    mode: GateMode
    gated_layers: tuple[int, ...]
    thresholds: tuple[float, ...] = ()
    span: int = UNLIMITED_SPAN
    warmup_tokens: int = 0
    batch_rule: BatchRule = "per_row"
    probability: float = 1.0
    seed: int = 0
    target_ratio: float = 0.0
    ramp_tokens: int = 0
    neurons: NeuronPlan | None = None

    @property
    def tested_layers(self) -> tuple[int, ...]:
        return tuple(layer - 1 for layer in self.gated_layers) if self.mode == "similarity" else ()


@dataclass(frozen=True)
class Policy:
    """Base of all policies. ``kind`` names the variant in files and tables."""

    kind: ClassVar[str]

    def plan(self, num_layers: int) -> GatePlan | None:
        """The gates for a model of ``num_layers``; None when no FFN is ever skipped.

        Raises:
            PolicyError: the policy is impossible on a model of this depth.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, object]:
        """For JSON and ``policy_from_dict``. Scales of neurons become text, and do not appear where there are none, so
        that earlier releases read it."""
        values = {"kind": self.kind, **{item.name: getattr(self, item.name) for item in fields(self)}}
        if scales := values.pop("up_scales", ()):
            values["up_scales"] = UpScales.of(scales).encoded()
        return values

    @property
    def label(self) -> str:
        """One line for tables and logs."""
        return self.kind


@dataclass(frozen=True)
class DensePolicy(Policy):
    """Every FFN runs; the program holds no gate and measures no similarity."""

    kind: ClassVar[str] = "dense"

    def plan(self, num_layers: int) -> GatePlan | None:
        return None


@with_old_names
@dataclass(frozen=True)
class SkipPolicy(NeuronRule, Policy):
    """FFN-SkipLLM: skip the next FFNs of a token once one FFN changes the residual stream too little. With thresholds
    for neurons, the FFNs that run leave out neurons.

    Args:
        threshold: cosine similarity of the residual stream before and after an FFN, in [-1, 1], from which on the
            following FFNs are skipped.
        span: how many layers one trigger skips; None: all up to the last dense layers.
        first_dense_layers: how many layers at the beginning always run their FFN.
        last_dense_layers: how many layers at the end always run their FFN.
        warmup_tokens: how many generated tokens of a row run every FFN. The first generated token always does,
            because it is computed at the prompt's last position.
        batch_rule: ``per_row`` (exact, default) decides each row alone; ``all`` skips only where every row wants to,
            ``majority`` where more than half do. The last two are not exact, but read fewer weights. A row in its
            warm-up keeps its FFNs under every rule.
        layer_thresholds: one threshold per layer instead of ``threshold``.
        target_ratio: hold the running skip ratio of every row, skipped FFNs over layers x generated tokens, at this
            value: a controller in the gate moves the row's threshold, starting from the one given. It makes up for
            the warm-up within the first ``ramp_tokens`` tokens. From then on the ratio stays within
            (1 / 2 + target_ratio) / tokens of the target, whatever the similarities are. Only with ``per_row``. With
            thresholds for neurons it is the share of FFN bytes not read that is held, skipped FFNs included, and by a
            factor on the thresholds for neurons; see ``NeuronPolicy``.
        gate_thresholds, product_thresholds, up_scales: see ``NeuronRule``.
    """

    kind: ClassVar[str] = "similarity"
    threshold: float = 0.99
    span: int | None = None
    first_dense_layers: int = 1
    last_dense_layers: int = 1
    warmup_tokens: int = 25
    batch_rule: BatchRule = "per_row"
    layer_thresholds: tuple[float, ...] | None = None
    target_ratio: float | None = None

    def __post_init__(self) -> None:
        for value in (self.threshold, *(self.layer_thresholds or ())):
            if not -1.0 <= value <= 1.0:  # NaN fails too
                raise PolicyError(f"threshold must be a cosine similarity in [-1, 1], got {value}")
        if self.span is not None and (not isinstance(self.span, Integral) or self.span < 1):
            raise PolicyError(
                f"span must be at least 1 layer (or None for 'up to the last dense layers'), got {self.span!r}"
            )
        _check_counts(self, "first_dense_layers", "last_dense_layers", "warmup_tokens")
        self.check_neuron_rule()
        if self.batch_rule not in BATCH_RULES:
            raise PolicyError(f"batch_rule must be one of {', '.join(BATCH_RULES)}, got {self.batch_rule!r}")
        if self.target_ratio is not None:
            _check_target(self.target_ratio)
            if self.batch_rule != "per_row":
                raise PolicyError(
                    f"target_ratio holds the ratio of each row, which batch_rule {self.batch_rule!r} gives up; "
                    "use per_row"
                )

    def reachable_ratio(self, num_layers: int) -> float:
        """The highest skip ratio of a token after the warm-up: every test triggers. 0: no layer may be skipped."""
        gated = max(0, num_layers - self.last_dense_layers - self.first_dense_layers - 1)
        return (gated - gated // (self.span + 1) if self.span else gated) / num_layers

    def ramp_tokens(self, num_layers: int) -> int:
        """Generated tokens after which ``target_ratio`` holds with the warm-up included: 64, or more if skipping at
        the highest possible ratio takes longer to make up for the warm-up."""
        assert self.target_ratio is not None
        return _ramp_tokens(self.warmup_tokens, self.reachable_ratio(num_layers), self.target_ratio)

    def plan(self, num_layers: int) -> GatePlan:
        gated = range(self.first_dense_layers + 1, num_layers - self.last_dense_layers)
        if not gated:
            raise PolicyError(
                f"first_dense_layers={self.first_dense_layers} and last_dense_layers={self.last_dense_layers} leave "
                f"nothing to skip in a model of {num_layers} layers; their sum must be at most {num_layers - 2}"
            )
        if self.layer_thresholds is not None and len(self.layer_thresholds) != num_layers:
            raise PolicyError(
                f"layer_thresholds has {len(self.layer_thresholds)} entries, the model {num_layers} layers"
            )
        held = None if self.has_neuron_rule else self.target_ratio  # by the gates; else by the neurons
        if held is not None and held >= self.reachable_ratio(num_layers):
            raise PolicyError(
                f"target_ratio {self.target_ratio} cannot be held: first_dense_layers={self.first_dense_layers}, "
                f"last_dense_layers={self.last_dense_layers} and span={self.span} let less than "
                f"{self.reachable_ratio(num_layers):.3f} of the FFNs of {num_layers} layers be skipped"
            )
        return GatePlan(
            mode="similarity",
            gated_layers=tuple(gated),
            thresholds=self.layer_thresholds or (self.threshold,) * num_layers,
            span=UNLIMITED_SPAN if self.span is None else self.span,
            warmup_tokens=self.warmup_tokens,
            batch_rule=self.batch_rule,
            target_ratio=held or 0.0,
            ramp_tokens=0 if held is None else self.ramp_tokens(num_layers),
            neurons=_neuron_plan(self, num_layers, self.target_ratio, self.warmup_tokens),
        )

    @property
    def label(self) -> str:
        span = "all" if self.span is None else self.span
        threshold = "per layer" if self.layer_thresholds else f"{self.threshold:.4f}"
        rule = f"similarity >= {threshold}" if self.target_ratio is None else f"ratio held at {self.target_ratio:.1%}"
        neurons = ", neurons below thresholds per layer" if self.has_neuron_rule else ""
        return f"{rule}, span {span}, dense {self.first_dense_layers}+{self.last_dense_layers}{neurons}"


@dataclass(frozen=True)
class NeuronPolicy(NeuronRule, Policy):
    """Every FFN runs, and leaves out the neurons of a token that matter least to it.

    Args:
        gate_thresholds, product_thresholds, up_scales: see ``NeuronRule``; thresholds of one kind are needed.
        warmup_tokens: how many generated tokens of a row keep every neuron; the first one always does.
        target_ratio: hold the running share of FFN bytes not read, over layers x generated tokens, at this value: a
            controller moves a factor on all thresholds of the row, starting from 1. It makes up for the warm-up within
            the first 64 tokens, or as many as it takes.
    """

    kind: ClassVar[str] = "neurons"
    warmup_tokens: int = 25
    target_ratio: float | None = None

    def __post_init__(self) -> None:
        self.check_neuron_rule()
        if not self.has_neuron_rule:
            raise PolicyError("a policy of neurons needs gate_thresholds or product_thresholds, one per layer")
        _check_counts(self, "warmup_tokens")
        if self.target_ratio is not None:
            _check_target(self.target_ratio)

    def plan(self, num_layers: int) -> GatePlan:
        return GatePlan(
            mode="similarity",
            gated_layers=(),
            warmup_tokens=self.warmup_tokens,
            neurons=_neuron_plan(self, num_layers, self.target_ratio, self.warmup_tokens),
        )

    @property
    def label(self) -> str:
        held = "" if self.target_ratio is None else f", {self.target_ratio:.1%} of the FFN bytes held"
        grains = [name for name in ("gate", "product") if any(getattr(self, f"{name}_thresholds"))]
        scaled = ", gates scaled per neuron" if self.up_scales else ""
        return f"neurons below {' and '.join(grains) or 'zero'} thresholds per layer{scaled}{held}"


@dataclass(frozen=True)
class FixedPolicy(NeuronRule, Policy):
    """Baseline: the FFNs of a fixed set of layers are skipped for every token after the warm-up. With thresholds for
    neurons (``NeuronRule``), those of the other layers leave out neurons."""

    kind: ClassVar[str] = "fixed"
    layers: tuple[int, ...]
    warmup_tokens: int = 25

    def __post_init__(self) -> None:
        for layer in self.layers:
            if not isinstance(layer, Integral):
                raise PolicyError(f"layers must be layer numbers, got {layer!r}")
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        _check_counts(self, "warmup_tokens")
        self.check_neuron_rule()

    def plan(self, num_layers: int) -> GatePlan | None:
        outside = [layer for layer in self.layers if not 0 <= layer < num_layers]
        if outside:
            raise PolicyError(f"fixed layer {outside[0]} is outside 0..{num_layers - 1}")
        neurons = _neuron_plan(self, num_layers, None, self.warmup_tokens)
        if not self.layers and neurons is None:
            return None
        return GatePlan(mode="fixed", gated_layers=self.layers, warmup_tokens=self.warmup_tokens, neurons=neurons)

    @property
    def label(self) -> str:
        runs: list[list[int]] = []
        for layer in self.layers:
            if runs and layer == runs[-1][-1] + 1:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        neurons = ", neurons below thresholds per layer" if self.has_neuron_rule else ""
        return f"fixed layers {','.join(str(r[0]) if len(r) == 1 else f'{r[0]}-{r[-1]}' for r in runs)}{neurons}"


@with_old_names
@dataclass(frozen=True)
class RandomPolicy(Policy):
    """Baseline: after the warm-up, each FFN outside the dense layers is skipped at random.

    The probability is set so that ``ratio`` of *all* layers' FFNs are skipped on average. The draw depends only on
    (seed, generated token, layer), so a row of a batch skips what it would skip alone.
    """

    kind: ClassVar[str] = "random"
    ratio: float
    seed: int = 0
    first_dense_layers: int = 1
    last_dense_layers: int = 1
    warmup_tokens: int = 25

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise PolicyError(f"random skip ratio must lie in [0, 1], got {self.ratio}")
        if not isinstance(self.seed, Integral) or not -(1 << 63) <= self.seed < 1 << 63:
            raise PolicyError(f"seed must be a 64-bit integer, got {self.seed!r}")
        _check_counts(self, "first_dense_layers", "last_dense_layers", "warmup_tokens")

    def plan(self, num_layers: int) -> GatePlan | None:
        if self.ratio == 0.0:
            return None
        gated = tuple(range(self.first_dense_layers, num_layers - self.last_dense_layers))
        reachable = len(gated) / num_layers
        if self.ratio > reachable:
            raise PolicyError(
                f"random skip ratio {self.ratio} cannot be reached: first_dense_layers={self.first_dense_layers} and "
                f"last_dense_layers={self.last_dense_layers} leave at most {reachable:.3f} of {num_layers} layers"
            )
        return GatePlan(
            mode="random",
            gated_layers=gated,
            warmup_tokens=self.warmup_tokens,
            probability=self.ratio / reachable,
            seed=self.seed,
        )

    @property
    def label(self) -> str:
        return f"random {self.ratio:.0%}"


@dataclass(frozen=True)
class TimingPolicy(Policy):
    """For timing on random weights only: skips ``round(ratio * num_layers)`` consecutive middle FFNs.

    Every similarity is computed and compared as in ``SkipPolicy``, but the thresholds are set so that one layer always
    triggers and no other does. Tokens decoded under it mean nothing.
    """

    kind: ClassVar[str] = "timing"
    ratio: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < 1.0:
            raise PolicyError(f"timing skip ratio must lie in [0, 1), got {self.ratio}")

    def plan(self, num_layers: int) -> GatePlan:
        skipped = math.floor(self.ratio * num_layers + 0.5)
        trigger = (num_layers - skipped) // 2 - 1
        if trigger < 0:
            raise PolicyError(
                f"timing skip ratio {self.ratio} leaves no layer that could trigger the skip in {num_layers} layers"
            )
        thresholds = [math.inf] * num_layers
        if skipped:
            thresholds[trigger] = -math.inf
        return GatePlan(
            mode="similarity",
            gated_layers=tuple(range(1, num_layers)),
            thresholds=tuple(thresholds),
            span=max(skipped, 1),
        )

    @property
    def label(self) -> str:
        return f"timing only, forced {self.ratio:.0%} (random weights)"


def _check_counts(policy: Policy, *names: str) -> None:
    for name in names:
        value = getattr(policy, name)
        if not isinstance(value, Integral):
            raise PolicyError(f"{name} must be a whole number, got {value!r}")
        if value < 0:
            raise PolicyError(f"{name} must not be negative, got {value}")


def _check_target(ratio: float) -> None:
    if not 0.0 < ratio < 1.0:
        raise PolicyError(f"target_ratio must lie between 0 and 1, got {ratio}")


def _ramp_tokens(warmup_tokens: int, reachable: float, target_ratio: float) -> int:
    return max(RAMP_TOKENS, math.ceil(max(1, warmup_tokens) * reachable / (reachable - target_ratio)))


def _neuron_plan(
    rule: NeuronRule, num_layers: int, target_ratio: float | None, warmup_tokens: int
) -> NeuronPlan | None:
    plan = rule.neuron_plan(num_layers)
    if plan is None or target_ratio is None:
        return plan
    reachable = rule.reachable_neuron_ratio(num_layers)
    if target_ratio >= reachable:
        raise PolicyError(
            f"target_ratio {target_ratio} cannot be held: the thresholds that are not 0 can leave out less than "
            f"{reachable:.3f} of the FFN bytes of {num_layers} layers, gate_proj being read in full"
        )
    ramp = _ramp_tokens(warmup_tokens, reachable, target_ratio)
    return replace(plan, target_ratio=target_ratio, ramp_tokens=ramp)


_KINDS: dict[str, type[Policy]] = {
    policy.kind: policy for policy in (DensePolicy, SkipPolicy, NeuronPolicy, FixedPolicy, RandomPolicy, TimingPolicy)
}


def policy_from_dict(values: dict[str, object]) -> Policy:
    """Inverse of ``Policy.to_dict``; reads the names of earlier releases too.

    Raises:
        PolicyError: unknown kind or unknown, missing or ill-typed field.
    """
    given = dict(values)
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise PolicyError(f"unknown policy kind {kind!r}; known are {', '.join(_KINDS)}")
    for name, value in given.items():
        if isinstance(value, list | tuple):
            given[name] = UpScales.decoded(value).values if name == "up_scales" and value else tuple(value)
    try:
        return _KINDS[kind](**given)
    except TypeError as error:
        raise PolicyError(f"policy of kind {kind!r}: {error}") from error
