"""Levels of single neurons for a model that came without a policy: thresholds from a short reading of text, kept for
the next start, and what every level costs on text that was not read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from skipkernels.calibration.forced_reading import NOBODY
from skipkernels.calibration.neuron_profile import profile_neurons
from skipkernels.calibration.passages import Passage, cut_passages
from skipkernels.calibration.scoring import Score, score
from skipkernels.chat.when_idle import WhenIdle
from skipkernels.decoding.own_rows import OwnRows
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.skipping.policy import DensePolicy, Policy
from skipkernels.skipping.policy_file import load_policy, save_policy

T = TypeVar("T")
PROMPT_TOKENS, NEW_TOKENS = 32, 64
_READ_PASSAGES, _COMPARED_PASSAGES = 6, 16
_SPLIT = 1.0  # gate thresholds over those of products; the first that a calibration tries
_WARMUP_TOKENS = 1
_LOG_PROBS_BYTES = 64 << 20  # of the dense model, kept while the levels are compared with it
_MAKE = "neurons-1"  # another number where thresholds are made in another way


class _Patient:
    """An engine whose rows are taken while nobody asks the model anything. No time is measured, so a request that comes
    in between two layers does no harm."""

    def __init__(self, engine: Engine, idle: WhenIdle) -> None:
        self._engine = engine
        self._idle = idle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def loop(self) -> _Patient:
        return self

    @contextlib.contextmanager
    def own_rows(self) -> Iterator[OwnRows]:
        with contextlib.ExitStack() as stack:
            while True:
                self._idle.wait()
                try:
                    own = stack.enter_context(self._engine.loop.own_rows())
                    break
                except RequestError:  # somebody came just now
                    self._idle.pause()
            yield own


class _Disturbed(Exception):
    """Somebody asked the model something."""


def neuron_policies(
    engine: Engine, texts: Sequence[str], levels: Sequence[float], idle: WhenIdle | None = None
) -> dict[float, Policy]:
    """Policies that hold the shares ``levels`` of FFN bytes unread, by thresholds that are made for them.

    Args:
        engine: with ``neuron_rows``.
        idle: None: nobody else uses the engine. Else it is read when nobody does.

    Raises:
        RequestError: the texts are too short.
        Stopped: see ``WhenIdle``.
    """
    read, _ = cut_passages(engine, texts, 2 * _READ_PASSAGES, PROMPT_TOKENS, NEW_TOKENS)
    reader = engine if idle is None else cast("Engine", _Patient(engine, idle))
    others = NOBODY if idle is None else idle
    profile = profile_neurons(reader, read, others=others)
    return {
        level: replace(profile.policy(level, _SPLIT, _WARMUP_TOKENS, others.wait), target_ratio=level)
        for level in sorted(levels)
    }


def measured_kl(
    engine: Engine, policies: Mapping[float, Policy], texts: Sequence[str], idle: WhenIdle | None = None
) -> dict[float, float]:
    """Mean KL(dense || policy) in nats per token of each level but 0, on the half of the text that thresholds are not
    made from. Arguments and errors as for ``neuron_policies``."""
    _, held_out = cut_passages(engine, texts, 2 * _COMPARED_PASSAGES, PROMPT_TOKENS, NEW_TOKENS)
    levels = {level: policy for level, policy in policies.items() if level > 0.0}
    sums = dict.fromkeys(levels, 0.0)
    room = max(1, _LOG_PROBS_BYTES // (4 * engine.config.vocab_size * NEW_TOKENS))
    for first in range(0, len(held_out), room):
        group = held_out[first : first + room]
        dense = _undisturbed(partial(_dense, engine, group), engine, idle)
        for level, policy in levels.items():
            sums[level] += _undisturbed(partial(_cost, engine, policy, group, dense), engine, idle)
    return {level: total / len(held_out) for level, total in sums.items()}


def _dense(engine: Engine, passages: Sequence[Passage], check: Callable[[], None]) -> list[Score]:
    return score(engine, passages, DensePolicy(), keep_log_probs=True, check=check)


def _cost(
    engine: Engine, policy: Policy, passages: Sequence[Passage], dense: Sequence[Score], check: Callable[[], None]
) -> float:
    scores = score(engine, passages, policy, reference=dense, check=check)
    kl = sum(float(one.kl.mean(dtype=np.float64)) for one in scores if one.kl is not None)
    return max(0.0, kl)  # rounding makes a tiny one negative


def _undisturbed(measure: Callable[[Callable[[], None]], T], engine: Engine, idle: WhenIdle | None) -> T:
    """``measure``, which calls what it is given often, so that a request that comes in ends it at once; then it is done
    again."""
    if idle is None:
        return measure(lambda: None)

    def check() -> None:
        if idle.given_up:
            raise _Disturbed

    def attempt() -> T | None:
        try:
            return measure(check)
        except _Disturbed:
            return None
        except RequestError:
            if engine.loop.idle:  # it is not because of requests in flight
                raise
            idle.disturb()
            return None

    result = idle.measure(attempt)
    assert result is not None, "what was disturbed is not a result"
    return result


def kept_policies(engine: Engine, levels: Sequence[float]) -> dict[float, Policy] | None:
    """Those that were measured on these weights before; None: not all of them were."""
    files = {level: _file(engine, level) for level in levels}
    if not all(file.exists() for file in files.values()):
        return None
    return {level: load_policy(file, fingerprint=engine.fingerprint) for level, file in files.items()}


def keep_policies(engine: Engine, policies: Mapping[float, Policy]) -> None:
    """For ``kept_policies``."""
    for level, policy in policies.items():
        file = _file(engine, level)
        with contextlib.suppress(OSError):  # a read-only home: they are measured again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            save_policy(file, policy, fingerprint=engine.fingerprint, measured={"made_by": "skipkernels serve"})


def cache_folder() -> Path:
    """Where servers keep what they measured."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "skipkernels"


def _file(engine: Engine, level: float) -> Path:
    return cache_folder() / "policies" / f"{engine.fingerprint}-{_MAKE}" / f"{level:g}.json"
