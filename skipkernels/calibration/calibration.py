"""Calibration: finds the policy closest to the dense model at a wanted saving, whatever its kind.

1. ``neuron_profile`` reads one half of the text: the neurons of every layer, and what leaving out some or all costs.
2. ``policy_search`` makes policies of every kind from it and tunes each to the saving by teacher-forced decoding.
3. ``verification`` decodes the best of each kind on the other half of the text; the best there is the result.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipkernels import __version__
from skipkernels.calibration.neuron_profile import NeuronProfile, probes, profile_neurons
from skipkernels.calibration.passages import cut_passages
from skipkernels.calibration.policy_search import Candidates, best_of_each_kind
from skipkernels.calibration.scoring import Comparison
from skipkernels.calibration.search_space import SearchSpace
from skipkernels.calibration.simulation import Similarities
from skipkernels.calibration.tuning import KINDS, KL_EXPONENT, TOLERANCE, Decoder, Kind, Trial
from skipkernels.calibration.verification import Margin, margin, verify
from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import BatchRule, Policy
from skipkernels.skipping.policy_file import save_policy
from skipkernels.support.progress import Meter, Progress

if TYPE_CHECKING:
    from skipkernels.engine import Engine

WARN_KL = 0.1
"""Divergence, in nats, from which on an answer reads differently: a fifth of SmolLM2's most likely tokens change."""
_FIRST_GUESS = 0.2  # a saving to begin with where a divergence is given
_STEPS = 5
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
                {"kind": trial.kind, "policy": trial.policy.to_dict(), "held_out": asdict(trial.comparison)}
                for trial in self.verified[1:]
            ],
            "margins": [{**asdict(margin), "verdict": margin.verdict} for margin in self.margins],
            "affordable": self.affordable,
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
        kinds: what to try.
        text_label: what the texts are, for the policy file.
        prompt_tokens: tokens of each passage that are prefilled.
        new_tokens: tokens of each passage that are decoded. The saving holds for generations of this length: shorter
            ones save less, because the warm-up takes a larger share of them.
        passages: how many passages to cut from the texts, at most.
        spans: candidates for ``SkipPolicy.span``; None: found.
        first_dense_layers, last_dense_layers: as in ``SkipPolicy``; None: found.
        warmup_tokens, batch_rule: as in ``SkipPolicy``.
        progress: see ``Progress``.

    Raises:
        RequestError: there is not enough text.
        PolicyError: the saving cannot be reached; the message says what can.
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
    layers = engine.config.num_hidden_layers
    allowed = None if spans is None else tuple(spans)
    space = SearchSpace(layers, allowed, first_dense_layers, last_dense_layers, warmup_tokens, batch_rule)
    search_part, held_out_part = cut_passages(engine, texts, passages, prompt_tokens, new_tokens)

    meter = Meter(progress)
    meter.stage("reading the text", 0.2, probes(search_part, layers))
    profile = profile_neurons(engine, search_part, meter.count)
    meter.stage("decoding policies of every kind", 0.8, _DECODES * len(search_part) * new_tokens)
    decoder = Decoder(engine, search_part, meter.count)
    if wanted_ratio is None:
        assert max_kl is not None
        wanted_ratio = _largest(decoder, profile, max_kl, warmup_tokens)
    trials = Candidates(decoder, profile, space, wanted_ratio).trials(kinds)

    meter.stage("verifying on held-out text", 1.0, (len(kinds) + 2) * len(held_out_part) * new_tokens)
    held_out = Decoder(engine, held_out_part, meter.count)
    verified = verify(held_out, best_of_each_kind(trials), warmup_tokens)
    for _ in range(_STEPS):
        best = verified[0]
        if max_kl is None or best.comparison.kl <= max_kl:
            break
        lower = best.wanted * _scale(max_kl, best.comparison.kl)
        trials = Candidates(decoder, profile, space, lower).trials([best.kind])
        verified = verify(held_out, trials[:1], warmup_tokens)
    affordable = None
    if verified[0].comparison.kl > warn_kl and "neurons" in kinds:
        affordable = _largest(held_out, profile, warn_kl, warmup_tokens)
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
    )


def _largest(decoder: Decoder, profile: NeuronProfile, max_kl: float, warmup_tokens: int) -> float:
    """The largest saving found that costs at most ``max_kl`` as neurons.

    Raises:
        PolicyError: not even a thousandth does.
    """
    share = decoder.share_past_warmup(warmup_tokens)
    ceiling = 2 / 3 * share - TOLERANCE  # gate_proj is always read
    wanted, found = min(_FIRST_GUESS, ceiling), 0.0
    for _ in range(_STEPS):
        trial = decoder.try_out("neurons", profile.policy(wanted / share, 1.0, warmup_tokens), wanted, warmup_tokens)
        if trial.comparison.kl <= max_kl:
            found = max(found, trial.comparison.skip_ratio)
        wanted = min(ceiling, wanted * _scale(max_kl, max(trial.comparison.kl, 1e-6)))
        if wanted < 1e-3:
            break
    if not found:
        raise PolicyError(f"no saving costs as little as {max_kl:g} nats: {wanted:.3f} of the FFN bytes costs more")
    return round(found, 4)


def _scale(max_kl: float, kl: float) -> float:
    """The factor on a saving of divergence ``kl`` that brings it just below ``max_kl``."""
    return min(2.0, 0.98 * float((max_kl / kl) ** (1 / KL_EXPONENT)))
