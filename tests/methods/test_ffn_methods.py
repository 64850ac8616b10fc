"""Methods on the engine: the policies that they find, and that nothing is added to what the engine does."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from skipkernels.calibration.neuron_profile import profile_neurons
from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError
from skipkernels.methods.ffn_methods import FixedSkip, Full, RandomSkip
from skipkernels.methods.ffn_skip import FFNSkip, HeldSkip
from skipkernels.methods.matching import skip_ratio
from skipkernels.methods.method import Found, Method
from skipkernels.methods.methods import METHODS
from skipkernels.methods.setup import Setup
from skipkernels.skipping.policy import FixedPolicy, NeuronPolicy, RandomPolicy, SkipPolicy, policy_from_dict
from tests.methods.conftest import ALIKE, LAYERS, PAST_WARMUP, RATIO
from tests.models import random_prompt


def measured_ratio(method: Method) -> float:
    passages = [Passage(tuple(random_prompt(8 + 40, seed)), 8) for seed in range(40)]
    work = [reading.work for reading in method.score(passages)]
    return sum(w.ffns_skipped for w in work) / sum(w.ffns for w in work)


def test_the_full_model_skips_nothing(setup: Setup) -> None:
    method = Full().build(setup, Full().find(setup, 0.0, ALIKE))
    prompts = [random_prompt(5, seed) for seed in range(10)]  # more than a batch
    answers = method.generate(prompts, max_new_tokens=9)
    for prompt, answer in zip(prompts, answers, strict=True):
        (generation,) = setup.engine.generate([prompt], max_new_tokens=9)
        assert (answer.token_ids, answer.text) == (generation.token_ids, generation.text)
        assert (answer.work.tokens, answer.work.ffns_skipped) == (9, 0)


def test_fixed_takes_the_blocks_that_cost_least_alone(setup: Setup, found: Callable[[str], Found]) -> None:
    policy = policy_from_dict(found("fixed")["policy"])
    assert isinstance(policy, FixedPolicy)
    costs = profile_neurons(setup.engine, setup.text_passages).block_kl.mean(axis=0)
    best = sorted(range(LAYERS), key=lambda layer: costs[layer])[:3]
    assert set(policy.layers) == set(best)
    assert policy.warmup_tokens == 1
    assert measured_ratio(FixedSkip().build(setup, found("fixed"))) == pytest.approx(RATIO * 39 / 40)


def test_random_skips_the_share_and_draws_anew_for_every_batch(setup: Setup, found: Callable[[str], Found]) -> None:
    policy = policy_from_dict(found("random")["policy"])
    assert isinstance(policy, RandomPolicy)
    assert policy.ratio == pytest.approx(RATIO / PAST_WARMUP)
    method = RandomSkip().build(setup, found("random"))
    # five batches of 39 skipping tokens, 8 layers that may skip: a binomial's standard deviation is 0.013
    assert measured_ratio(method) == pytest.approx(policy.ratio * 39 / 40, abs=0.04)
    passage = Passage(tuple(random_prompt(48)), 8)
    readings = method.score([passage] * 16)  # two batches
    assert len({reading.log_probs.tobytes() for reading in readings[:8]}) == 1
    assert len({reading.log_probs.tobytes() for reading in readings}) == 2


def test_skip_is_calibrated_on_the_text_and_matched_on_what_is_alike(
    setup: Setup, found: Callable[[str], Found]
) -> None:
    policy = policy_from_dict(found("skip")["policy"])
    calibrated = policy_from_dict(setup.memory[f"calibration of similarity at {RATIO}"])
    assert isinstance(policy, SkipPolicy)
    assert policy == replace(calibrated, threshold=policy.threshold)
    assert policy.warmup_tokens == 1
    readings = FFNSkip().build(setup, found("skip")).score(ALIKE)
    assert skip_ratio(readings) == pytest.approx(RATIO, abs=0.01)


def test_skip_is_calibrated_once_for_a_ratio(setup: Setup, found: Callable[[str], Found]) -> None:
    found("skip")
    stages: list[str] = []
    FFNSkip().find(setup, RATIO, ALIKE[:3], lambda stage, share: stages.append(stage))
    assert stages
    assert all(stage.startswith("matching") for stage in stages)


def test_thresholds_per_layer_are_moved_together(setup: Setup) -> None:
    per_layer = SkipPolicy(
        span=2,
        first_dense_layers=1,
        warmup_tokens=1,
        layer_thresholds=tuple(0.9 + layer / 1000 for layer in range(LAYERS)),
    )
    other = Setup(setup.engine, [], memory={"calibration of similarity at 0.2": per_layer.to_dict()})
    found = FFNSkip().find(other, 0.2, ALIKE)
    policy = policy_from_dict(found["policy"])
    assert isinstance(policy, SkipPolicy)
    assert policy.layer_thresholds is not None
    factors = [(1 - moved) / (0.1 - layer / 1000) for layer, moved in enumerate(policy.layer_thresholds)]
    assert factors == pytest.approx([factors[0]] * LAYERS, rel=1e-3)
    assert skip_ratio(FFNSkip().build(other, found).score(ALIKE)) == pytest.approx(0.2, abs=0.02)


def test_a_calibrated_policy_that_cannot_reach_the_ratio_gives_way_to_one_that_can(setup: Setup) -> None:
    narrow = SkipPolicy(span=1, first_dense_layers=5, last_dense_layers=2, warmup_tokens=1).to_dict()
    wide = SkipPolicy(span=None, first_dense_layers=1, last_dense_layers=1, warmup_tokens=1).to_dict()
    memory = {"calibration of similarity at 0.3": narrow, "calibration of similarity at 0.35": wide}
    found = FFNSkip().find(Setup(setup.engine, [], memory=memory), 0.3, ALIKE)
    assert found["policy"]["first_dense_layers"] == 1
    assert skip_ratio(FFNSkip().build(setup, found).score(ALIKE)) == pytest.approx(0.3, abs=0.01)
    with pytest.raises(PolicyError, match=r"span 1, dense 5\+2, calibrated on the text, saves at most 0\.09"):
        FFNSkip().find(Setup(setup.engine, [], memory=dict.fromkeys(memory, narrow)), 0.3, ALIKE)


@pytest.mark.parametrize("name", ["neuron", "mixed", "cats", "teal"])
def test_methods_that_leave_out_neurons_reach_the_share_of_bytes(
    setup: Setup, found: Callable[[str], Found], name: str
) -> None:
    method = METHODS[name].build(setup, found(name))
    assert skip_ratio(method.score(ALIKE)) == pytest.approx(RATIO, abs=0.015)


def test_cats_thresholds_gates_alone_and_neuron_both(found: Callable[[str], Found]) -> None:
    cats, neuron = (policy_from_dict(found(name)["policy"]) for name in ("cats", "neuron"))
    assert isinstance(cats, NeuronPolicy)
    assert isinstance(neuron, NeuronPolicy)
    assert cats.product_thresholds == ()
    assert min(neuron.gate_thresholds) > 0
    assert min(neuron.product_thresholds) > 0


def test_neurons_cost_less_than_gates_alone_or_whole_blocks(setup: Setup, found: Callable[[str], Found]) -> None:
    dense = Full().build(setup, Full().find(setup, 0.0, ALIKE)).score(ALIKE, keep_log_probs=True)

    def kl(name: str) -> float:
        readings = METHODS[name].build(setup, found(name)).score(ALIKE, reference=dense)
        return float(np.mean([reading.kl.mean() for reading in readings if reading.kl is not None]))

    assert kl("neuron") < kl("cats")
    assert kl("neuron") < kl("fixed") / 2


def test_the_controller_holds_the_share_of_bytes_in_every_row(setup: Setup, found: Callable[[str], Found]) -> None:
    policy = policy_from_dict(found("held")["policy"])
    assert isinstance(policy, NeuronPolicy)
    assert policy.target_ratio == RATIO
    long = [Passage(tuple(random_prompt(8 + 80, seed)), 8) for seed in range(3)]
    for reading in HeldSkip().build(setup, found("held")).score(long):
        assert reading.work.ffn_skip_ratio == pytest.approx(RATIO, abs=0.02)


def test_a_batch_is_read_against_its_own_reference(setup: Setup) -> None:
    passages = [Passage(tuple(random_prompt(20, seed)), 4) for seed in range(10)]
    full = Full().build(setup, Full().find(setup, 0.0, ALIKE))
    dense = full.score(passages, keep_log_probs=True)
    for reading in full.score(passages, reference=dense):
        assert reading.kl == pytest.approx(0.0, abs=1e-6)
        assert reading.all_log_probs is None


@pytest.mark.parametrize("kind", [FFNSkip(), RandomSkip(), FixedSkip()])
@pytest.mark.parametrize("ratio", [0.0, 0.8])
def test_an_impossible_ratio_names_the_reachable_one(setup: Setup, kind: FixedSkip, ratio: float) -> None:
    with pytest.raises(PolicyError, match=r"1 warm-up tokens, generations of 4 tokens skip at most 0\.750"):
        kind.find(setup, ratio, [Passage((1,) * 6, 2)])
