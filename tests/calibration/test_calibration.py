"""Calibration: the best of every kind where the search has not looked; and what it says when it cannot."""

import json
import random
from pathlib import Path

import pytest

from skipkernels.calibration.calibration import Calibration, calibrate
from skipkernels.calibration.passages import Passage, cut_passages
from skipkernels.calibration.tuning import KINDS, Decoder
from skipkernels.engine import Engine
from skipkernels.errors import PolicyError, RequestError
from skipkernels.skipping.policy_file import load_policy
from tests.models import BOS, byte_tokenizer, random_prompt, tiny_engine, tiny_module

LAYERS = 10
SIZES = {"prompt_tokens": 8, "new_tokens": 40, "passages": 12, "warmup_tokens": 5}
TEXT = random_prompt(2000)


def engine(seed: int = 0) -> Engine:
    module = tiny_module(seed=seed, num_hidden_layers=LAYERS)
    return tiny_engine(module=module, max_batch_size=8, tokenizer=byte_tokenizer(), neuron_rows=True)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(engine(), [TEXT], 0.3, text_label="random bytes", **SIZES)


def test_the_wanted_saving_is_reached(calibration: Calibration) -> None:
    assert calibration.reached
    assert calibration.held_out.skip_ratio == pytest.approx(0.3, abs=0.06)  # one block is 0.1, half of it may miss
    assert calibration.held_out.tokens == 6 * 40


def test_the_policy_is_the_best_of_every_kind_baselines_included(calibration: Calibration) -> None:
    assert {trial.kind for trial in calibration.verified} == set(KINDS)
    reached = [trial for trial in calibration.verified if not trial.rank[0]]
    assert calibration.best.costs.mean() == min(trial.costs.mean() for trial in reached)
    assert all(
        margin.verdict != "loses to"
        for margin, other in zip(calibration.margins, calibration.verified[1:], strict=True)
        if other in reached
    )
    assert calibration.policy == calibration.best.policy


def test_the_policy_is_measured_on_the_half_that_was_not_searched(calibration: Calibration) -> None:
    _, held_out = cut_passages(engine(), [TEXT], SIZES["passages"], SIZES["prompt_tokens"], SIZES["new_tokens"])
    decoder = Decoder(engine(), held_out, lambda tokens: None)
    for trial in calibration.verified:
        assert decoder.try_out(trial.kind, trial.policy, trial.wanted, 5) == trial


def test_the_speed_is_measured_beside_the_dense_models(calibration: Calibration) -> None:
    assert calibration.gain is not None
    assert calibration.gain.new_tokens == 40
    assert (set(calibration.gains) == set(KINDS)) == (not calibration.gain.faster)
    untimed = calibrate(engine(), [TEXT], 0.3, kinds=("neurons",), timed=False, **SIZES)
    assert untimed.gain is None
    assert untimed.measured()["speed"] == {}


def test_a_baseline_that_is_best_is_what_is_returned() -> None:
    result = calibrate(engine(), [TEXT], 0.3, kinds=("random", "fixed"), **SIZES)
    assert result.best.kind in ("random", "fixed")
    assert result.policy.kind == result.best.kind


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_neurons_of_experts_are_calibrated(family: str, tmp_path: Path) -> None:
    """By thresholds of whole layers; the policy's file gives what was measured."""
    module = tiny_module(family, num_hidden_layers=LAYERS)
    experts = tiny_engine(module=module, max_batch_size=8, neuron_rows=True)
    result = calibrate(experts, [TEXT], 0.3, timed=False, **SIZES)
    assert {trial.kind for trial in result.verified} == set(KINDS)
    neurons = next(trial for trial in result.verified if trial.kind == "neurons")
    assert neurons.comparison.skip_ratio == pytest.approx(0.3, abs=0.03)
    assert neurons.policy.gate_thresholds
    assert not neurons.policy.up_scales
    fixed = next(trial for trial in result.verified if trial.kind == "fixed")
    assert neurons.comparison.kl < fixed.comparison.kl / 2
    result.save(tmp_path / "policy.json")
    loaded = load_policy(tmp_path / "policy.json", fingerprint=experts.fingerprint)
    assert loaded == result.policy
    one = tiny_engine(module=tiny_module(family, num_hidden_layers=LAYERS), policy=neurons.policy)
    answers = [one.generate(random_prompt(8, seed), max_new_tokens=40, eos_token_ids=())[0] for seed in range(4)]
    assert sum(answer.unread_ratio for answer in answers) / 4 == pytest.approx(0.3, abs=0.05)


def test_experts_in_blocks_are_calibrated_by_whole_ffns(caplog: pytest.LogCaptureFixture) -> None:
    """Neurons are not among what is tried, which is said; alone they are refused."""
    wide = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 32}
    module = tiny_module("qwen3_moe", num_hidden_layers=LAYERS, **wide)
    experts = tiny_engine(module=module, dtype="q8_0", max_batch_size=8)
    result = calibrate(experts, [TEXT], 0.3, timed=False, **SIZES)
    assert {trial.kind for trial in result.verified} == {"similarity", "fixed", "random"}
    assert result.reached
    assert result.held_out.skip_ratio == pytest.approx(0.3, abs=0.06)
    assert "calibration tries these kinds: similarity, fixed, random" in caplog.text
    with pytest.raises(PolicyError, match="single neurons of experts in q8_0 cannot be left out"):
        calibrate(experts, [TEXT], 0.3, kinds=("neurons", "mixed"), **SIZES)


def test_an_engine_with_the_policy_saves_as_measured(calibration: Calibration) -> None:
    prompts = [random_prompt(8, seed) for seed in range(8)]
    generations = engine().generate(prompts, max_new_tokens=40, eos_token_ids=(), policy=calibration.policy)
    assert sum(g.unread_ratio for g in generations) / 8 == pytest.approx(0.3, abs=0.06)


def test_given_bounds_are_kept() -> None:
    result = calibrate(
        engine(), [TEXT], 0.15, kinds=("similarity",), spans=(2,), first_dense_layers=2, last_dense_layers=1, **SIZES
    )
    assert (result.policy.span, result.policy.first_dense_layers, result.policy.last_dense_layers) == (2, 2, 1)
    assert result.policy.warmup_tokens == 5


def test_the_saved_policy_belongs_to_its_model_and_says_what_it_was_made_on(
    calibration: Calibration, tmp_path: Path
) -> None:
    path = tmp_path / "skip_policy.json"
    calibration.save(path)
    assert load_policy(path, fingerprint=engine().fingerprint) == calibration.policy
    with pytest.raises(PolicyError, match="skipkernels calibrate"):
        load_policy(path, fingerprint=engine(seed=1).fingerprint)
    measured = json.loads(path.read_text())["measured"]
    assert measured["text"] == "random bytes"
    assert measured["kind"] == calibration.best.kind
    assert measured["held_out"]["skip_ratio"] == calibration.held_out.skip_ratio
    assert [other["kind"] for other in measured["others"]] == [trial.kind for trial in calibration.verified[1:]]
    assert [m["verdict"] for m in measured["margins"]] == [m.verdict for m in calibration.margins]
    assert len(measured["similarity"]["p10"]) == LAYERS


def test_progress_only_grows_and_the_result_is_the_same_again(calibration: Calibration) -> None:
    seen: list[tuple[str, float]] = []
    report = lambda stage, share: seen.append((stage, share))  # noqa: E731
    again = calibrate(engine(), [TEXT], 0.3, text_label="random bytes", progress=report, **SIZES)
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] <= 1.0
    assert again == calibration


def test_the_largest_saving_within_a_divergence() -> None:
    """Half the divergence of a policy is kept, and not by saving nothing."""
    known = calibrate(engine(), [TEXT], 0.2, kinds=("neurons",), warn_kl=100.0, **SIZES)
    budget = known.held_out.kl / 2
    result = calibrate(engine(), [TEXT], max_kl=budget, kinds=("neurons",), warn_kl=100.0, **SIZES)
    assert budget / 3 < result.held_out.kl <= budget
    assert 0.05 < result.held_out.skip_ratio < known.held_out.skip_ratio


def test_where_the_best_costs_too_much_the_affordable_saving_is_named() -> None:
    dear = calibrate(engine(), [TEXT], 0.3, kinds=("neurons",), warn_kl=0.001, **SIZES)
    assert dear.held_out.kl > 0.001
    assert dear.affordable is not None
    assert 0 < dear.affordable < 0.3
    cheap = calibrate(engine(), [TEXT], 0.3, kinds=("neurons",), warn_kl=100.0, **SIZES)
    assert cheap.affordable is None


@pytest.mark.parametrize(
    ("ratio", "options", "message"),
    [
        (0.0, {}, r"in \(0, 1\)"),
        (1.5, {}, r"in \(0, 1\)"),
        (0.95, {}, r"0\.95 of the FFN bytes cannot be reached by .* at most 0\.875"),
        (0.7, {"kinds": ("neurons",)}, r"cannot be reached by neurons.* at most 0\.583"),
        (None, {}, "either the wanted saving or the largest divergence"),
        (0.2, {"max_kl": 0.1}, "either the wanted saving or the largest divergence"),
        (None, {"max_kl": 0.0}, "max_kl must be a divergence above 0 nats"),
        (None, {"max_kl": float("inf")}, "max_kl must be finite"),
        (0.2, {"warn_kl": float("nan")}, "warn_kl must be a divergence above 0 nats"),
        (0.2, {"spans": ()}, "spans is empty"),
    ],
)
def test_what_is_impossible_is_refused(ratio: float | None, options: dict[str, object], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        calibrate(engine(), [TEXT], ratio, **SIZES | options)


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
