"""The search for the policy closest to the dense model at a wanted skip ratio.

1. Every span in every window of layers is ranked by simulating the skip rule on the dense model's similarities.
2. The best candidates of each kind decode a few passages, and the best of those decode all passages.
3. From there, coordinate search: dense layers and span, then the warm-up, then, on request, the threshold of each
   layer. Every step decodes, at the wanted ratio.

The simulation alone is not enough: on the demo model, per-layer thresholds that lower the simulated change raise the
real divergence, because a skipped FFN changes the inputs of later layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from skipkernels.calibration.search_space import WARMUPS, SearchSpace
from skipkernels.calibration.simulation import Similarities, rank
from skipkernels.calibration.tuning import RATIO_TOLERANCE, Trial, Tuner
from skipkernels.skipping.policy import SkipPolicy
from skipkernels.support.progress import Meter

_RANKED_POSITIONS = 256  # enough to rank candidates by
_PER_KIND = 2  # candidates kept of each span and of each first_dense_layers
_SHORTLIST = 32
_FEW_PASSAGES = 4
_FINALISTS = 8
_EXPANSIONS = 8  # at most so many policies have their neighbours tried
_PATIENCE = 2  # expansions in a row without improvement, then the search stops
_SWEEPS = 2  # over the thresholds of all layers


def search(tuner: Tuner, space: SearchSpace, per_layer: bool, meter: Meter, until: float) -> list[Trial]:
    """All policies that have decoded all passages, the best first.

    Args:
        tuner: decodes, and knows the wanted ratio.
        per_layer: search one threshold per layer at the end.
        meter, until: for the progress bar; ``until`` is the share that is done after the search.
    """
    begin = meter.share
    stages = 4 if per_layer else 3
    ends = [begin + (until - begin) * (number + 1) / stages for number in range(stages)]

    shortlist = _shortlist(tuner, space)
    # under the other rules the rows of a batch decide together: a smaller batch would skip more
    few = tuner.on_part(_FEW_PASSAGES) if space.batch_rule == "per_row" else tuner
    meter.stage(f"trying {len(shortlist)} policies", ends[0], 2 * len(shortlist) * few.tokens)
    first = _sorted(few.tune(policy, close=RATIO_TOLERANCE, runs=2) for policy in shortlist)
    meter.stage("decoding with the best of them", ends[1], 2 * _FINALISTS * tuner.tokens)
    trials = [tuner.tune(trial.policy, trial.bias) for trial in first[:_FINALISTS]]
    meter.stage("moving dense layers and span", ends[2], 8 * _EXPANSIONS * tuner.tokens)
    trials = _around(tuner, space, trials)
    trials += _warmups(tuner, space, trials[0])
    if per_layer:
        best = _sorted(trials)[0]
        meter.stage("moving the threshold of each layer", ends[3], 4 * _SWEEPS * space.layers * tuner.tokens)
        trials.append(_per_layer(tuner, best))
    return _sorted(trials)


def _sorted(trials: Iterable[Trial]) -> list[Trial]:
    return sorted(trials, key=lambda trial: trial.rank)


def _shortlist(tuner: Tuner, space: SearchSpace) -> list[SkipPolicy]:
    """The best two candidates of each span and of each first_dense_layers, by the simulation.

    Not the best overall, which would be too much alike: the simulation does not know which layers tolerate skipping.
    """
    similarities = tuner.similarities
    sample = similarities[:: max(1, len(similarities) // _RANKED_POSITIONS)]
    ranked = rank(sample, space.candidates(), tuner.wanted_ratio / tuner.share_past_warmup(space.widest))
    kept: list[SkipPolicy] = []
    seen: dict[tuple[str, int | None], int] = {}
    for policy in ranked:
        kinds = ("span", policy.span), ("first_dense_layers", policy.first_dense_layers)
        if any(seen.get(kind, 0) < _PER_KIND for kind in kinds):
            kept.append(policy)
        for kind in kinds:
            seen[kind] = seen.get(kind, 0) + 1
    return kept[:_SHORTLIST]


def _around(tuner: Tuner, space: SearchSpace, trials: Sequence[Trial]) -> list[Trial]:
    """Tries the neighbours of the best policy, then of the best one not yet expanded, and so on."""
    found = _sorted(trials)
    tried = {_shape(trial.policy) for trial in trials}
    expanded: set[SkipPolicy] = set()
    in_vain = 0
    while len(expanded) < min(_EXPANSIONS, len(found)) and in_vain < _PATIENCE:
        best = found[0]
        center = next(trial for trial in found if trial.policy not in expanded)
        expanded.add(center.policy)
        for neighbour in space.neighbours(center.policy):
            shape = _shape(neighbour)
            if shape not in tried and _reaches(tuner, space, neighbour):
                tried.add(shape)
                found.append(tuner.tune(neighbour, center.bias))
        found = _sorted(found)
        in_vain = in_vain + 1 if found[0] is best else 0
    return found


def _warmups(tuner: Tuner, space: SearchSpace, best: Trial) -> list[Trial]:
    """The best policy with other warm-ups, tuned to the same ratio."""
    if space.warmup_tokens is not None:
        return []
    others = (replace(best.policy, warmup_tokens=warmup) for warmup in WARMUPS if warmup != best.policy.warmup_tokens)
    return [tuner.tune(policy, best.bias) for policy in others if _reaches(tuner, space, policy)]


def _per_layer(tuner: Tuner, trial: Trial) -> Trial:
    """Moves one layer's threshold at a time; the others are tuned to keep the ratio. Returns the best found."""
    layers = tuner.similarities.shape[1]
    best = replace(trial, policy=replace(trial.policy, layer_thresholds=(trial.policy.threshold,) * layers))
    for _ in range(_SWEEPS):
        before = best
        for layer in best.policy.plan(layers).tested_layers:
            for policy in _threshold_moves(best.policy, layer, tuner.similarities):
                moved = tuner.tune(policy, best.bias)
                if moved.rank < best.rank:
                    best = moved
                    break
        if best is before:
            break
    return best


def _threshold_moves(policy: SkipPolicy, layer: int, similarities: Similarities) -> list[SkipPolicy]:
    """The threshold of ``layer`` moved halfway to where it always triggers, and halfway to where it never does."""
    assert policy.layer_thresholds is not None
    column = similarities[:, layer]
    share = float((column >= policy.layer_thresholds[layer]).mean())
    moves = []
    for other in ((1 + share) / 2, share / 2):
        thresholds = list(policy.layer_thresholds)
        thresholds[layer] = round(float(np.quantile(column, 1 - other)), 7)
        if thresholds[layer] != policy.layer_thresholds[layer]:
            moves.append(replace(policy, layer_thresholds=tuple(thresholds)))
    return moves


def _shape(policy: SkipPolicy) -> tuple[int | None, int, int]:
    return policy.span, policy.first_dense_layers, policy.last_dense_layers


def _reaches(tuner: Tuner, space: SearchSpace, policy: SkipPolicy) -> bool:
    reachable = policy.reachable_ratio(space.layers) * tuner.share_past_warmup(policy)
    return reachable >= tuner.wanted_ratio - RATIO_TOLERANCE
