"""Calibration: finds the policy closest to the dense model at a wanted saving, whatever its kind.

1. ``neuron_profile`` reads one half of the text: the neurons of every layer, and what leaving out some or all costs.
2. ``policy_search`` makes policies of every kind from it and tunes each to the saving by teacher-forced decoding.
3. ``verification`` decodes the best of each kind on the other half of the text; the best there is the result.
"""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipkernels import __version__
from skipkernels.calibration.budget import FIRST_GUESS, Affordable, largest_within
from skipkernels.calibration.neuron_profile import NeuronProfile, probes, profile_neurons
from skipkernels.calibration.passages import Passage, cut_passages
from skipkernels.calibration.policy_search import Candidates, best_of_each_kind
from skipkernels.calibration.scoring import Comparison
from skipkernels.calibration.search_space import SearchSpace
from skipkernels.calibration.simulation import Similarities
from skipkernels.calibration.speed import Gain, measure_gains
from skipkernels.calibration.tuning import KINDS, TOLERANCE, Decoder, Kind, Trial
from skipkernels.calibration.verification import Margin, margin, verify
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import BatchRule, Policy
from skipkernels.skipping.policy_file import save_policy
from skipkernels.support.progress import Meter, Progress

if TYPE_CHECKING:
    from skipkernels.engine import Engine

logger = logging.getLogger(__name__)

WARN_KL = 0.1
"""Divergence, in nats, from which on an answer reads differently: a fifth of SmolLM2's most likely tokens change."""
_PATIENCE_S = 10.0  # to time one policy
_DECODES = 30  # for the progress bar


@dataclass(frozen=True)
class SimilarityCurve:
    """Cosine of the residual stream before and after each layer's FFN, dense, over the calibration positions."""

    mean: tuple[float, ...]
    p10: tuple[float, ...]
    p90: tuple[float, ...]

    @classmethod
    def of(cls, similarities: Similarities) -> SimilarityCurve:
        rows = (similarities.mean(axis=0), *np.quantile(similarities, (0.1, 0.9), axis=0))
        return cls(*(tuple(round(float(value), 6) for value in row) for row in rows))


@dataclass(frozen=True)
class Calibration:
    """The policy that was found, and its measurements."""

    verified: tuple[Trial, ...]  # the best of each kind on held-out text, the best first
    trials: tuple[Trial, ...]  # on the search half of the text, the best first
    margins: tuple[Margin, ...]  # of the policy over the other kinds
    affordable: float | None  # where the policy costs more than ``warn_kl``: the largest saving found below it
    warn_kl: float
    curve: SimilarityCurve
    text: str
    prompt_tokens: int
    new_tokens: int
    warmup_tokens: int
    fingerprint: str
    dtype: str
    gains: dict[Kind, Gain] = field(default_factory=dict, compare=False)
    """Decode speed of the policy beside the dense model's; where that is no gain, of the other kinds' too. Empty: not
    measured."""

    @property
    def best(self) -> Trial:
        return self.verified[0]

    @property
    def policy(self) -> Policy:
        return self.best.policy

    @property
    def held_out(self) -> Comparison:
        return self.best.comparison

    @property
    def wanted_ratio(self) -> float:
        return self.best.wanted

    @property
    def reached(self) -> bool:
        """Whether the policy saves what was wanted on held-out text, within what its kind can."""
        return not self.best.rank[0]

    @property
    def gain(self) -> Gain | None:
        return self.gains.get(self.best.kind)

    @property
    def faster(self) -> Trial | None:
        """Where the policy is no faster than the dense model: the best of the others that is."""
        reached = (trial for trial in self.verified[1:] if not trial.rank[0] and trial.kind in self.gains)
        return next((trial for trial in reached if self.gains[trial.kind].faster), None)

    def measured(self) -> dict[str, Any]:
        """The measurements that the policy file keeps: plain JSON."""
        return {
            "kind": self.best.kind,
            "wanted_ratio": self.wanted_ratio,
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "held_out": asdict(self.held_out),
            "others": [
                {"kind": trial.kind, "policy": without_scales(trial.policy), "held_out": asdict(trial.comparison)}
                for trial in self.verified[1:]
            ],
            "margins": [{**asdict(margin), "verdict": margin.verdict} for margin in self.margins],
            "affordable": self.affordable,
            "speed": {kind: {**asdict(gain), "faster": gain.faster} for kind, gain in self.gains.items()},
            "similarity": asdict(self.curve),
            "dtype": self.dtype,
            "date": date.today().isoformat(),
            "versions": {
                "skipkernels": __version__,
                "python": platform.python_version(),
                "torch": version("torch"),
                "transformers": version("transformers"),
            },
        }

    def save(self, path: str | Path) -> None:
        """Writes a policy file."""
        save_policy(path, self.policy, fingerprint=self.fingerprint, measured=self.measured())


def without_scales(policy: Policy) -> dict[str, Any]:
    """For tables: scales are the same in all policies of one calibration, and long."""
    return {name: value for name, value in policy.to_dict().items() if name != "up_scales"}


def check_wanted(wanted_ratio: float | None, max_kl: float | None, warn_kl: float) -> None:
    """What ``calibrate`` asks of these arguments.

    Raises:
        PolicyError: both of the first two or neither are given, or a number is out of its range.
    """
    if (wanted_ratio is None) == (max_kl is None):
        raise PolicyError("give either the wanted saving or the largest divergence")
    if wanted_ratio is not None and not 0.0 < wanted_ratio < 1.0:
        raise PolicyError(f"the wanted saving must lie in (0, 1), got {wanted_ratio}")
    if max_kl == math.inf:
        raise PolicyError("max_kl must be finite, got inf")
    for name, value in (("max_kl", max_kl), ("warn_kl", warn_kl)):
        if value is not None and not value > 0.0:
            raise PolicyError(f"{name} must be a divergence above 0 nats, got {value}")


def calibrate(
    engine: Engine,
    texts: Sequence[str | Sequence[int]],
    wanted_ratio: float | None = None,
    *,
    max_kl: float | None = None,
    warn_kl: float = WARN_KL,
    kinds: Sequence[Kind] = KINDS,
    text_label: str = "given text",
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    passages: int = 32,
    spans: Sequence[int | None] | None = None,
    first_dense_layers: int | None = None,
    last_dense_layers: int | None = None,
    warmup_tokens: int = 1,
    batch_rule: BatchRule = "per_row",
    timed: bool = True,
    progress: Progress = lambda stage, share: None,
) -> Calibration:
    """Finds the policy that leaves ``wanted_ratio`` of the FFN bytes unread with the least change to the output.

    The change is the mean KL divergence from the dense model over all decoded tokens, warm-up included. The result is
    the best of all that was tried on held-out text, fixed and random blocks included. The same arguments give the same
    policy.

    Args:
        engine: decodes in batches; a larger ``max_batch_size``, up to half of ``passages``, is faster.
        texts: text or token ids, in any number of pieces. The search uses the first half of each, the second half is
            held out.
        wanted_ratio: share of the FFN bytes not read, over layers x generated tokens, warm-up included, in (0, 1).
        max_kl: in its place, the divergence that may be reached, in nats: the largest saving below it is found.
        warn_kl: where the best policy costs more, the largest saving below it is found and named.
        kinds: what to try; of experts in blocks, whole FFNs only.
        text_label: what the texts are, for the policy file.
        prompt_tokens: tokens of each passage that are prefilled.
        new_tokens: tokens of each passage that are decoded. The saving holds for generations of this length: shorter
            ones save less, because the warm-up takes a larger share of them.
        passages: how many passages to cut from the texts, at most.
        spans: candidates for ``SkipPolicy.span``; None: found.
        first_dense_layers, last_dense_layers: as in ``SkipPolicy``; None: found.
        warmup_tokens, batch_rule: as in ``SkipPolicy``.
        timed: measure the decode speed of the policy too, beside the dense model's; where it is no faster, that of the
            other kinds as well.
        progress: see ``Progress``.

    Raises:
        RequestError: there is not enough text.
        PolicyError: the saving cannot be reached; the message says what can.
    """
    check_wanted(wanted_ratio, max_kl, warn_kl)
    if engine.no_neurons:
        kinds = _without_neurons(kinds, engine.no_neurons)
    layers = engine.config.num_hidden_layers
    allowed = None if spans is None else tuple(spans)
    space = SearchSpace(layers, allowed, first_dense_layers, last_dense_layers, warmup_tokens, batch_rule)
    search_part, held_out_part = cut_passages(engine, texts, passages, prompt_tokens, new_tokens)

    meter = Meter(progress)
    meter.stage("reading the text", 0.2, probes(search_part, layers))
    profile = profile_neurons(engine, search_part, meter.count)
    meter.stage("decoding policies of every kind", 0.8, _DECODES * len(search_part) * new_tokens)
    search = _Search(Decoder(engine, search_part, meter.count), profile, space)
    if wanted_ratio is None:
        assert max_kl is not None
        wanted_ratio = search.first_guess(max_kl, kinds)
    trials = search.trials(wanted_ratio, kinds)

    meter.stage("verifying on held-out text", 1.0, (len(kinds) + 2) * len(held_out_part) * new_tokens)
    held_out = Decoder(engine, held_out_part, meter.count)
    verified = verify(held_out, best_of_each_kind(trials), warmup_tokens)
    if max_kl is not None:
        verified, trials = search.within(max_kl, held_out, verified, kinds, trials)
    affordable = None
    if verified[0].comparison.kl > warn_kl and "neurons" in kinds:
        found = search.largest_as_neurons(held_out, warn_kl).largest
        affordable = None if found is None else round(found.comparison.skip_ratio, 4)
    return Calibration(
        verified=tuple(verified),
        trials=tuple(trials),
        margins=tuple(margin(verified[0], other) for other in verified[1:]),
        affordable=affordable,
        warn_kl=warn_kl,
        curve=SimilarityCurve.of(profile.similarities),
        text=text_label,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        warmup_tokens=warmup_tokens,
        fingerprint=engine.fingerprint,
        dtype=engine.dtype,
        gains=_gains(engine, held_out_part[0], verified) if timed else {},
    )


def _without_neurons(kinds: Sequence[Kind], reason: str) -> list[Kind]:
    """
    Raises:
        PolicyError: nothing is left.
    """
    left = [kind for kind in kinds if kind not in ("neurons", "mixed")]
    if not left:
        raise PolicyError(reason)
    if len(left) < len(kinds):
        logger.warning("%s; calibration tries these kinds: %s", reason, ", ".join(left))
    return left


def _gains(engine: Engine, passage: Passage, verified: Sequence[Trial]) -> dict[Kind, Gain]:
    """Of the first; where it is no faster than the dense model, of all."""
    prompt = passage.token_ids[: passage.prompt_tokens]
    gains: dict[Kind, Gain] = {}
    for part in (verified[:1], verified[1:]):
        if any(gain.faster for gain in gains.values()):
            break
        policies = [trial.policy for trial in part]
        measured = measure_gains(
            engine, prompt, policies, new_tokens=passage.decoded_tokens, patience_s=_PATIENCE_S * len(part)
        )
        gains |= {trial.kind: gain for trial, gain in zip(part, measured, strict=True)}
    return gains


class _Search:
    """Policies of every kind at any saving, tuned on the search half of the text."""

    def __init__(self, decoder: Decoder, profile: NeuronProfile, space: SearchSpace) -> None:
        self._decoder = decoder
        self._profile = profile
        self._most = profile.most  # of the FFN bytes, where no neurons at all are read
        self._space = space
        self._warmup = space.widest.warmup_tokens

    def trials(self, wanted: float, kinds: Sequence[Kind]) -> list[Trial]:
        """The best first."""
        return Candidates(self._decoder, self._profile, self._space, wanted).trials(kinds)

    def first_guess(self, max_kl: float, kinds: Sequence[Kind]) -> float:
        """A saving that costs about ``max_kl``: as neurons, which are tried quickly, where they are of ``kinds``."""
        if "neurons" not in kinds:
            return FIRST_GUESS
        found = self.largest_as_neurons(self._decoder, max_kl)
        return (found.largest or found.cheapest).wanted

    def largest_as_neurons(self, decoder: Decoder, max_kl: float) -> Affordable:
        share = decoder.share_past_warmup(self._warmup)

        def try_at(wanted: float) -> Trial:
            policy = self._profile.policy(wanted / share, 1.0, self._warmup)
            return decoder.try_out("neurons", policy, wanted, self._warmup)

        return largest_within(max_kl, try_at, FIRST_GUESS, self._ceiling("neurons"))

    def within(
        self,
        max_kl: float,
        held_out: Decoder,
        verified: list[Trial],
        kinds: Sequence[Kind],
        trials: list[Trial],
    ) -> tuple[list[Trial], list[Trial]]:
        """``verified`` and ``trials`` at the largest saving that the best kind affords on held-out text: this kind is
        followed down or up to it, then every kind is tuned to it and verified there. What costs more than the budget
        comes last.

        Raises:
            PolicyError: nothing is affordable.
        """
        best = verified[0]

        def try_at(wanted: float) -> Trial:
            if wanted == best.wanted:
                return best
            return verify(held_out, self.trials(wanted, [best.kind])[:1], self._warmup)[0]

        largest = largest_within(max_kl, try_at, best.wanted, self._ceiling(best.kind)).required(max_kl)
        if largest.wanted != best.wanted:
            trials = self.trials(largest.wanted, kinds)
            others = [trial for trial in best_of_each_kind(trials) if trial.kind != largest.kind]
            verified = [largest, *verify(held_out, others, self._warmup)]
        return sorted(verified, key=lambda trial: (trial.comparison.kl > max_kl, trial.rank)), trials

    def _ceiling(self, kind: Kind) -> float:
        """Just below the most that ``kind`` can save: of neurons, gate_proj is always read."""
        whole = {"neurons": self._most, "mixed": self._most, "similarity": self._space.reachable_ratio}.get(kind, 1.0)
        return whole * self._decoder.share_past_warmup(self._warmup) - TOLERANCE
