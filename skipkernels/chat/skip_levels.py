"""Skip levels: the policy of each share of FFN bytes that a served model can leave out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from skipkernels.errors import PolicyError
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, Policy, SkipPolicy
from skipkernels.skipping.policy_file import load_policy, read_policy_file

USUAL_LEVELS = (0.0, 0.1, 0.2, 0.3)
MOST_OF_NEURONS = 2 / 3
"""No policy of neurons leaves out so much: gate_proj, a third of an FFN's bytes, is always read."""


def usual_levels(base: Policy, num_layers: int) -> list[float]:
    """Those of ``USUAL_LEVELS`` that ``base`` can hold in a model of ``num_layers``."""
    reachable = 0.0
    if isinstance(base, SkipPolicy | NeuronPolicy) and base.has_neuron_rule:
        reachable = base.reachable_neuron_ratio(num_layers)
    elif isinstance(base, SkipPolicy):
        reachable = base.reachable_ratio(num_layers)
    return [level for level in USUAL_LEVELS if level == 0.0 or level < reachable]


def policies_of_levels(base: Policy, skip_levels: Sequence[float]) -> dict[float, Policy]:
    """The policy of each skip level: ``base``, held at this share by its controller.

    Raises:
        PolicyError: ``base`` cannot hold a ratio, or a level is impossible or given twice.
    """
    check_levels(skip_levels)
    if any(skip_levels) and not isinstance(base, SkipPolicy | NeuronPolicy):
        raise PolicyError(
            f"skip levels are held by policies of blocks by similarity and of neurons; a policy of kind {base.kind!r} "
            "holds none"
        )
    policies: dict[float, Policy] = {}
    for level in sorted(skip_levels):
        if level == 0.0:
            policies[level] = DensePolicy()
        else:
            assert isinstance(base, SkipPolicy | NeuronPolicy)
            policies[level] = replace(base, target_ratio=level)
    return policies


def policies_of_files(paths: Sequence[str | Path]) -> dict[float, Policy]:
    """The policies of several files, each at the share that it was measured to leave out or holds, and the dense one.

    Raises:
        PolicyError: a file cannot be read or says no share, or two say the same.
    """
    policies: dict[float, Policy] = {0.0: DensePolicy()}
    names: dict[float, str | Path] = {}
    for path in paths:
        level = _share_of(path)
        if level in names:
            raise PolicyError(f"{names[level]} and {path} both leave out a share of {level:g}; give one of them")
        names[level] = path
        policies[level] = load_policy(path)
    return dict(sorted(policies.items()))


def check_levels(skip_levels: Sequence[float]) -> None:
    """Raises PolicyError unless they differ and there is one."""
    if len(set(skip_levels)) < len(skip_levels) or not skip_levels:
        raise PolicyError(f"skip levels must differ, and there must be one; got {list(skip_levels)}")
    wrong = [level for level in skip_levels if not 0.0 <= level < 1.0]  # NaN fails too
    if wrong:
        raise PolicyError(f"a skip level is a target_ratio in [0, 1), got {wrong[0]}")


def own_levels(policies: Mapping[float, Policy], wanted: Iterable[float]) -> dict[float, Policy]:
    """Those of ``policies`` that are ``wanted``.

    Raises:
        PolicyError: there is none of a wanted level.
    """
    missing = [level for level in wanted if level not in policies]
    if missing:
        known = ", ".join(f"{level:g}" for level in policies)
        raise PolicyError(f"no policy file leaves out a share of {missing[0]:g}; they are for {known}")
    return {level: policies[level] for level in sorted(wanted)}


def _share_of(path: str | Path) -> float:
    """To two decimals, as a client names it."""
    document = read_policy_file(path)
    values: Any = document.get("policy")
    held = values.get("target_ratio") if isinstance(values, dict) else None
    measured: Any = document.get("measured")
    on_text = measured.get("held_out") if isinstance(measured, dict) else None
    share = held if held is not None else on_text.get("skip_ratio") if isinstance(on_text, dict) else None
    if not isinstance(share, int | float) or not 0.005 <= share < 0.995:
        raise PolicyError(
            f"{path}: says no share of FFN bytes that it leaves out, so it cannot be one of several levels; "
            "`skipkernels calibrate` measures it"
        )
    return round(float(share), 2)
