"""Calibration: the wanted ratio, measured where the search has not looked; and what it says when it cannot."""

import json
import random
from pathlib import Path

import pytest

from skipkernels.calibration.calibration import Calibration, calibrate
from skipkernels.calibration.passages import Passage, cut_passages
from skipkernels.calibration.tuning import RATIO_TOLERANCE
from skipkernels.engine import Engine
from skipkernels.errors import PolicyError, RequestError
from skipkernels.skipping.policy import BatchRule
from skipkernels.skipping.policy_file import load_policy
from tests.models import BOS, byte_tokenizer, random_prompt, tiny_engine, tiny_module

LAYERS = 10
SIZES = {"prompt_tokens": 8, "new_tokens": 40, "passages": 12, "warmup_tokens": 5}
TEXT = random_prompt(2000)


def engine(seed: int = 0) -> Engine:
    module = tiny_module(seed=seed, num_hidden_layers=LAYERS)
    return tiny_engine(module=module, max_batch_size=8, tokenizer=byte_tokenizer())


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(engine(), [TEXT], 0.3, **SIZES)


def test_the_wanted_ratio_is_reached(calibration: Calibration) -> None:
    found = calibration.trials[0].comparison
    assert calibration.reached
    assert found.skip_ratio == pytest.approx(0.3, abs=RATIO_TOLERANCE)
    # 210 tokens past the warm-up skip none to 9 of 10 FFNs: one standard deviation is 0.03 at most
    assert calibration.held_out.skip_ratio == pytest.approx(0.3, abs=0.08)
    assert calibration.held_out.tokens == 6 * 40


def test_the_best_of_the_trials_at_the_ratio_is_taken(calibration: Calibration) -> None:
    assert calibration.policy == calibration.trials[0].policy
    reached = [t for t in calibration.trials if t.missed <= RATIO_TOLERANCE]
    assert len({trial.policy.span for trial in reached}) > 1
    assert calibration.trials[0].cost == min(trial.cost for trial in reached)


def test_the_baselines_have_the_policys_warm_up_and_ratio(calibration: Calibration) -> None:
    assert [b.policy.kind for b in calibration.baselines] == ["fixed", "fixed", "random"]
    for baseline in calibration.baselines:
        assert baseline.policy.to_dict()["warmup_tokens"] == 5
        assert baseline.comparison.dense_perplexity == calibration.held_out.dense_perplexity
    fixed, chance = calibration.margins
    assert (fixed.against, chance.against) == ("fixed", "random")
    assert fixed.skip_ratio == pytest.approx(calibration.held_out.skip_ratio)


def test_an_engine_with_the_policy_skips_as_measured(calibration: Calibration) -> None:
    prompts = [random_prompt(8, seed) for seed in range(8)]
    generations = engine().generate(prompts, max_new_tokens=40, eos_token_ids=(), policy=calibration.policy)
    assert sum(g.skip_ratio for g in generations) / 8 == pytest.approx(0.3, abs=0.06)


def test_given_bounds_are_kept() -> None:
    result = calibrate(engine(), [TEXT], 0.15, spans=(2,), first_dense_layers=2, last_dense_layers=1, **SIZES)
    assert (result.policy.span, result.policy.first_dense_layers, result.policy.last_dense_layers) == (2, 2, 1)
    assert result.policy.warmup_tokens == 5


def test_the_saved_policy_belongs_to_its_model(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "skip_policy.json"
    calibration.save(path)
    assert load_policy(path, fingerprint=engine().fingerprint) == calibration.policy
    with pytest.raises(PolicyError, match="skipkernels calibrate"):
        load_policy(path, fingerprint=engine(seed=1).fingerprint)
    measured = json.loads(path.read_text())["measured"]
    assert measured["new_tokens"] == 40
    assert measured["held_out"]["skip_ratio"] == calibration.held_out.skip_ratio
    assert [b["policy"]["kind"] for b in measured["baselines"]] == ["fixed", "fixed", "random"]
    assert [m["verdict"] for m in measured["margins"]] == [m.verdict for m in calibration.margins]
    assert len(measured["similarity"]["p10"]) == LAYERS


def test_progress_only_grows_and_the_result_is_the_same_again(calibration: Calibration) -> None:
    seen: list[tuple[str, float]] = []
    again = calibrate(engine(), [TEXT], 0.3, progress=lambda stage, share: seen.append((stage, share)), **SIZES)
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    assert again == calibration


@pytest.mark.parametrize("batch_rule", ["all", "majority"])
def test_rows_that_decide_together_reach_the_ratio(batch_rule: BatchRule) -> None:
    result = calibrate(engine(), [TEXT], 0.2, batch_rule=batch_rule, spans=(2,), first_dense_layers=2, **SIZES)
    assert result.policy.batch_rule == batch_rule
    assert result.reached


def test_a_warm_up_that_is_not_given_is_searched() -> None:
    sizes = SIZES | {"warmup_tokens": None}
    result = calibrate(engine(), [TEXT], 0.12, spans=(2,), first_dense_layers=2, last_dense_layers=1, **sizes)
    assert {trial.policy.warmup_tokens for trial in result.trials} == {1, 4, 8, 16, 25}
    assert {b.policy.to_dict()["warmup_tokens"] for b in result.baselines} == {result.policy.warmup_tokens}


def test_thresholds_per_layer_are_no_worse_than_one_for_all() -> None:
    given = {"spans": (2,), "first_dense_layers": 2, "last_dense_layers": 2, **SIZES}
    one, many = (calibrate(engine(), [TEXT], 0.2, per_layer=choice, **given) for choice in (False, True))
    assert many.policy.layer_thresholds is not None
    assert many.reached
    assert many.trials[0].cost < one.trials[0].cost
    assert many.trials[1:] == one.trials


@pytest.mark.parametrize(("ratio", "message"), [(0.0, r"in \(0, 1\)"), (1.5, r"in \(0, 1\)"), (0.95, r"at most 0\.7")])
def test_an_impossible_ratio_is_refused(ratio: float, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        calibrate(engine(), [TEXT], ratio, **SIZES)


def test_no_spans_at_all_is_refused() -> None:
    with pytest.raises(PolicyError, match="spans is empty"):
        calibrate(engine(), [TEXT], 0.3, spans=(), **SIZES)


def test_cold_layers_bound_what_can_be_reached() -> None:
    # 10 layers, of which 3 may skip, in 35 of 40 tokens
    with pytest.raises(
        PolicyError, match=r"first_dense_layers=4, last_dense_layers=2 and 5 warm-up tokens.* skip at most 0\.263"
    ):
        calibrate(engine(), [TEXT], 0.3, first_dense_layers=4, last_dense_layers=2, **SIZES)


def test_a_warm_up_longer_than_the_generation_leaves_nothing() -> None:
    with pytest.raises(PolicyError, match=r"at most 0\.000"):
        calibrate(engine(), [TEXT], 0.1, **SIZES | {"warmup_tokens": 40})


@pytest.mark.parametrize("texts", [[], [""], ["short"], [random_prompt(90)]])
def test_too_little_text_says_how_much_is_needed(texts: list[str | list[int]]) -> None:
    with pytest.raises(RequestError, match="at least 96"):
        calibrate(engine(), texts, 0.3, **SIZES)


def test_passages_are_disjoint_and_begin_as_prompts_do() -> None:
    text = "".join(random.Random(0).choices("abcdefgh", k=1000))
    search, held_out = cut_passages(engine(), [text], 12, prompt_tokens=8, new_tokens=40)
    assert (len(search), len(held_out)) == (6, 6)
    whole = list(text.encode())

    def place(passage: Passage) -> int:
        assert (passage.token_ids[0], len(passage.token_ids), passage.prompt_tokens) == (BOS, 48, 8)
        body = list(passage.token_ids[1:])
        return next(start for start in range(len(whole)) if whole[start : start + len(body)] == body)

    assert max(map(place, search)) + 47 <= min(map(place, held_out))


def test_every_span_can_be_searched_alone() -> None:
    for span in (None, 1, 4):
        result = calibrate(engine(), [TEXT], 0.2, spans=(span,), first_dense_layers=2, **SIZES)
        assert result.policy.span == span
        assert result.reached
