"""Strategies: the modalities that are kept, and the share of FFNs that is skipped.

MOSEL (EMNLP 2024, arXiv 2310.18481) chooses among modality subsets, FFN-SkipLLM (EMNLP 2024, arXiv 2404.03865) among
skip levels. A strategy is a pair of both, so that one optimiser chooses among all pairs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any, Protocol

from skipkernels.modality.errors import StrategyError

_MODALITY = re.compile(r"[a-z][a-z0-9_]*")

Inputs = Mapping[str, Any]
"""One request's data by modality name. Only the model looks into it."""


@dataclass(frozen=True, order=True)
class Strategy:
    """A modality subset and a skip level.

    Args:
        modalities: what is kept, at least one; kept sorted, so that equal subsets are equal strategies.
        skip_level: the share of FFN executions that the model's policy for this level skips, in [0, 1); 0: dense.
    """

    modalities: tuple[str, ...]
    skip_level: float = 0.0

    def __post_init__(self) -> None:
        for modality in self.modalities:
            if not isinstance(modality, str) or not _MODALITY.fullmatch(modality):
                raise StrategyError(
                    f"a modality's name is lower-case letters, digits and underscores, starting with a letter; "
                    f"got {modality!r}"
                )
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise StrategyError(f"a strategy keeps at least one modality, each once; got {self.modalities}")
        if not 0.0 <= self.skip_level < 1.0:  # NaN fails too
            raise StrategyError(f"skip_level must be a share of FFNs in [0, 1), got {self.skip_level}")
        object.__setattr__(self, "modalities", tuple(sorted(self.modalities)))
        object.__setattr__(self, "skip_level", float(self.skip_level))

    @property
    def name(self) -> str:
        """Like ``audio+video@0.25``: the same for equal strategies, and ``Strategy.parse`` reads it."""
        return f"{'+'.join(self.modalities)}@{self.skip_level!r}".removesuffix(".0")

    @classmethod
    def parse(cls, name: str) -> Strategy:
        """Inverse of ``name``; without ``@`` the skip level is 0.

        Raises:
            StrategyError: not a strategy's name.
        """
        modalities, at, level = name.partition("@")
        try:
            return cls(tuple(modalities.split("+")), float(level) if at else 0.0)
        except ValueError as error:  # float()'s own, or a StrategyError
            raise StrategyError(f"{name!r} is not a strategy like 'audio+video@0.25' ({error})") from error

    def __str__(self) -> str:
        return self.name


def all_strategies(
    modalities: Sequence[str], skip_levels: Sequence[float] = (0.0,), *, required: Collection[str] = ()
) -> tuple[Strategy, ...]:
    """Every non-empty subset of ``modalities`` that holds the ``required`` ones, at every skip level."""
    unknown = sorted(set(required) - set(modalities))
    if unknown:
        raise StrategyError(f"required modality {unknown[0]!r} is not among {', '.join(modalities)}")
    optional = [modality for modality in modalities if modality not in required]
    subsets = chain.from_iterable(combinations(optional, size) for size in range(len(optional), -1, -1))
    return tuple(
        Strategy((*required, *subset), level) for subset in subsets if required or subset for level in skip_levels
    )


class ModalityModel(Protocol):
    """A model that can run on subsets of its modalities: what a server needs.

    Attributes:
        name: for people and for ``/v1/models``.
        fingerprint: binds a profile to these weights; any string that changes with them.
        device: where it runs, like ``cpu`` or ``cuda:0``; a profile is refused on another.
        dtype: of its weights, like ``bf16``; a profile is refused for another.
        modalities: every name that ``Inputs`` may hold.
        strategies: what it offers, see ``all_strategies``.
    """

    name: str
    fingerprint: str
    device: str
    dtype: str
    modalities: tuple[str, ...]
    strategies: tuple[Strategy, ...]

    def run(self, batch: Sequence[Inputs], strategy: Strategy) -> Sequence[Any]:
        """One output per request, in order, once they are ready.

        Called from one thread at a time, not the one that accepts jobs. Inputs may hold modalities that ``strategy``
        does not keep; they are ignored, at no cost.
        """
        ...

    def score(self, output: Any, expected: Any) -> float:
        """The metric on one request, in [0, 1]: 1 or 0 for right or wrong, or a share."""
        ...
