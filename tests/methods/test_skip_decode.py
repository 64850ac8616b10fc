"""SkipDecode: which layers a token runs, that bypassed entries are never attended to, and the wanted ratio."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError
from skipkernels.methods.layer_decoder import LayerDecoder
from skipkernels.methods.lengths import Lengths
from skipkernels.methods.matching import skip_ratio
from skipkernels.methods.methods import METHODS
from skipkernels.methods.setup import Setup
from skipkernels.methods.skip_decode import DepthSchedule, SkipDecode
from tests.models import random_prompt, tiny_engine, tiny_module

LAYERS, PROMPT, TOKENS = 10, 7, 16


def layers_run(schedule: DepthSchedule, step: int) -> list[int]:
    hidden, ran, steps = torch.zeros(1, 4), torch.ones(1, dtype=torch.bool), torch.tensor([step])
    return [layer for layer in range(schedule.num_layers) if schedule.runs(layer, hidden, ran, steps)]


def test_a_token_runs_the_first_layer_and_those_at_the_top() -> None:
    schedule = DepthSchedule(num_layers=8, most=8, fewest=4, new_tokens=5, warmup_tokens=1)
    assert [layers_run(schedule, step) for step in (-3, 0, 1, 2, 3, 4, 5, 99)] == [
        [0, 1, 2, 3, 4, 5, 6, 7],  # the prompt
        [0, 1, 2, 3, 4, 5, 6, 7],  # its last position yields the first token
        [0, 1, 2, 3, 4, 5, 6, 7],  # 7.5 of 8
        [0, 2, 3, 4, 5, 6, 7],  # 6.5
        [0, 3, 4, 5, 6, 7],  # 5.5
        [0, 4, 5, 6, 7],  # 4.5
        [0, 5, 6, 7],
        [0, 5, 6, 7],
    ]


@given(
    most=st.floats(2, LAYERS),
    share=st.floats(0, 1),
    new_tokens=st.integers(1, 40),
    warmup_tokens=st.integers(1, 10),
)
def test_no_token_runs_a_layer_that_an_earlier_one_did_not(
    most: float, share: float, new_tokens: int, warmup_tokens: int
) -> None:
    schedule = DepthSchedule(LAYERS, most, 2 + share * (most - 2), new_tokens, warmup_tokens)
    before = set(range(LAYERS))
    for step in range(-2, 60):
        now = set(layers_run(schedule, step))
        assert now <= before
        assert {0, LAYERS - 1} <= now
        before = now


def test_what_a_bypassed_layer_caches_is_never_read() -> None:
    engine = tiny_engine(module=tiny_module(num_hidden_layers=LAYERS))
    tokens = torch.tensor(random_prompt(PROMPT + TOKENS))
    schedule = DepthSchedule(LAYERS, most=9, fewest=3, new_tokens=TOKENS, warmup_tokens=2)
    plain = LayerDecoder(engine.config, engine.weights, engine.max_seq_len)
    expected, ran = plain.read(tokens, schedule, 1 - PROMPT)
    assert not ran.all()
    poisoned = LayerDecoder(engine.config, engine.weights, engine.max_seq_len)
    for position, token in enumerate(tokens):
        hidden, ran_here = poisoned.read(token[None], schedule, 1 - PROMPT + position)
        torch.testing.assert_close(hidden[0], expected[position], atol=1e-4, rtol=1e-4)
        for layer in (~ran_here[0]).nonzero()[:, 0]:
            poisoned._k_cache[layer, :, position] = float("nan")
            poisoned._v_cache[layer, :, position] = float("nan")


@pytest.mark.parametrize("counts", [(40,), (3, 5, 5, 8, 20), (70, 70)])
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_the_schedule_skips_the_wanted_share(setup: Setup, counts: tuple[int, ...], ratio: float) -> None:
    alike = [Passage(tuple(random_prompt(4 + count, seed=count)), 4) for count in counts]
    found = SkipDecode().find(setup, ratio, alike)
    readings = SkipDecode().build(setup, found).score(alike)
    one_layer = 1 / LAYERS / len(set(counts))  # layers are whole: a bound moves several tokens by one
    assert skip_ratio(readings) == pytest.approx(ratio, abs=max(0.01, one_layer / 5))
    assert found["most"] > found["fewest"] >= 2
    assert found["new_tokens"] == max(counts)


def test_of_the_schedules_at_the_ratio_the_closest_to_the_full_model_is_taken(setup: Setup) -> None:
    alike = [Passage(tuple(random_prompt(44, seed)), 4) for seed in range(3)]
    full = METHODS["full"].build(setup, METHODS["full"].find(setup, 0.0, alike)).score(alike, keep_log_probs=True)
    kind = SkipDecode()
    schedules = kind._candidates(setup, 0.3, Lengths.of(alike))
    assert len({schedule.most for schedule in schedules}) == 3
    divergences = []
    for schedule in schedules:
        readings = kind.build(setup, asdict(schedule)).score(alike, reference=full)
        assert skip_ratio(readings) == pytest.approx(0.3, abs=0.02)
        divergences.append(np.mean([reading.kl for reading in readings]))
    assert kind.find(setup, 0.3, alike) == asdict(schedules[int(np.argmin(divergences))])
    assert max(divergences) > 1.01 * min(divergences)


def test_an_impossible_ratio_names_the_reachable_one(setup: Setup) -> None:
    with pytest.raises(PolicyError, match=r"at least 2 of 10 layers and 1 warm-up tokens.* skip at most 0\.600"):
        SkipDecode().find(setup, 0.65, [Passage((1,) * 6, 2)])
