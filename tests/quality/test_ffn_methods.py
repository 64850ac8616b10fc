"""Methods on the engine: the policies that they find, and that nothing is added to what the engine does."""

from collections.abc import Callable

import numpy as np
import pytest

from skipkernels.errors import PolicyError
from skipkernels.passages import Passage
from skipkernels.policy import FixedPolicy, RandomPolicy, policy_from_dict
from skipkernels.quality.ffn_methods import FFNSkip, FixedSkip, Full, RandomSkip
from skipkernels.quality.lengths import Lengths
from skipkernels.quality.method import Found, Method
from skipkernels.quality.setup import Setup
from skipkernels.scoring import dense_similarities
from tests.models import random_prompt
from tests.quality.conftest import LAYERS, LENGTHS, RATIO

PAST_WARMUP = RATIO * 82 / 79


def measured_ratio(method: Method) -> float:
    passages = [Passage(tuple(random_prompt(8 + 40, seed)), 8) for seed in range(40)]
    work = [reading.work for reading in method.score(passages)]
    return sum(w.ffns_skipped for w in work) / sum(w.ffns for w in work)


def test_the_full_model_skips_nothing(setup: Setup) -> None:
    method = Full().build(setup, Full().find(setup, 0.0, LENGTHS))
    prompts = [random_prompt(5, seed) for seed in range(10)]  # more than a batch
    answers = method.generate(prompts, max_new_tokens=9)
    for prompt, answer in zip(prompts, answers, strict=True):
        (generation,) = setup.engine.generate([prompt], max_new_tokens=9)
        assert (answer.token_ids, answer.text) == (generation.token_ids, generation.text)
        assert (answer.work.tokens, answer.work.ffns_skipped) == (9, 0)


def test_fixed_takes_the_layers_of_the_highest_mean_similarity(setup: Setup, found: Callable[[str], Found]) -> None:
    policy = policy_from_dict(found("fixed")["policy"])
    assert isinstance(policy, FixedPolicy)
    similarities = np.concatenate(list(dense_similarities(setup.engine, setup.search_passages(LENGTHS.typical))))
    best = sorted(range(LAYERS), key=lambda layer: -similarities[:, layer].mean())[:3]
    assert set(policy.layers) == set(best)
    assert policy.warmup_tokens == 1
    assert measured_ratio(FixedSkip().build(setup, found("fixed"))) == pytest.approx(RATIO * 39 / 40)


def test_random_skips_the_share_and_draws_anew_for_every_batch(setup: Setup, found: Callable[[str], Found]) -> None:
    policy = policy_from_dict(found("random")["policy"])
    assert isinstance(policy, RandomPolicy)
    assert policy.ratio == pytest.approx(PAST_WARMUP)
    method = RandomSkip().build(setup, found("random"))
    # five batches of 39 skipping tokens, 8 layers that may skip: a binomial's standard deviation is 0.013
    assert measured_ratio(method) == pytest.approx(policy.ratio * 39 / 40, abs=0.04)
    passage = Passage(tuple(random_prompt(48)), 8)
    readings = method.score([passage] * 16)  # two batches
    assert len({reading.log_probs.tobytes() for reading in readings[:8]}) == 1
    assert len({reading.log_probs.tobytes() for reading in readings}) == 2


def test_skip_is_calibrated_for_the_ratio_and_the_length(setup: Setup, found: Callable[[str], Found]) -> None:
    values = found("skip")
    assert values["policy"]["kind"] == "similarity"
    assert values["policy"]["warmup_tokens"] == 1
    assert values["calibrated_ratio"] == pytest.approx(PAST_WARMUP * (1 - 1 / LENGTHS.typical), abs=0.06)  # 8 passages
    assert measured_ratio(FFNSkip().build(setup, values)) == pytest.approx(PAST_WARMUP * 39 / 40, abs=0.06)


def test_a_batch_is_read_against_its_own_reference(setup: Setup) -> None:
    passages = [Passage(tuple(random_prompt(20, seed)), 4) for seed in range(10)]
    full = Full().build(setup, Full().find(setup, 0.0, LENGTHS))
    dense = full.score(passages, keep_log_probs=True)
    for reading in full.score(passages, reference=dense):
        assert reading.kl == pytest.approx(0.0, abs=1e-6)
        assert reading.all_log_probs is None


@pytest.mark.parametrize("kind", [FFNSkip(), RandomSkip(), FixedSkip()])
@pytest.mark.parametrize("ratio", [0.0, 0.8])
def test_an_impossible_ratio_names_the_reachable_one(setup: Setup, kind: FixedSkip, ratio: float) -> None:
    with pytest.raises(PolicyError, match=r"1 warm-up tokens, generations of 4 tokens skip at most 0\.750"):
        kind.find(setup, ratio, Lengths((4, 4)))
