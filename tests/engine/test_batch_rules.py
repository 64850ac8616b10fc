"""Batch rules in a whole decoding: together or not at all, and exact where there is one row."""

import numpy as np
import pytest

from skipkernels.engine import Engine
from skipkernels.skipping.policy import SkipPolicy
from tests.models import random_prompt, tiny_engine, tiny_module

PROMPTS = [random_prompt(length, seed=length) for length in (4, 11, 7)]


def engine_of(rule: str, rows: int, warmup: int = 2) -> Engine:
    policy = SkipPolicy(threshold=0.75, span=1, cold_start=0, cold_end=0, warmup_tokens=warmup, batch_rule=rule)
    return tiny_engine(module=tiny_module(num_hidden_layers=6), policy=policy, max_batch_size=rows)


@pytest.mark.parametrize("rule", ["all", "majority"])
def test_rows_skip_together_or_not_at_all(rule: str) -> None:
    maps = [answer.skip_map for answer in engine_of(rule, 3).generate(PROMPTS, max_new_tokens=40)]
    assert (maps[0] == maps[1]).all()
    assert (maps[0] == maps[2]).all()
    assert maps[0].any()


def test_a_majority_skips_more_than_all_do() -> None:
    ratio = {
        rule: np.mean([answer.skip_ratio for answer in engine_of(rule, 3).generate(PROMPTS, max_new_tokens=40)])
        for rule in ("all", "majority", "per_row")
    }
    assert 0 < ratio["all"] < ratio["majority"]
    assert ratio["all"] < ratio["per_row"]


@pytest.mark.parametrize("rule", ["all", "majority"])
def test_one_row_decides_as_ever(rule: str) -> None:
    (together,) = engine_of(rule, 1).generate(PROMPTS[0], max_new_tokens=20)
    (alone,) = engine_of("per_row", 1).generate(PROMPTS[0], max_new_tokens=20)
    assert together.token_ids == alone.token_ids
    assert (together.skip_map == alone.skip_map).all()
    assert alone.skip_map.any()


@pytest.mark.parametrize("rule", ["all", "majority"])
def test_rows_that_ended_have_no_vote(rule: str) -> None:
    """Once its two neighbours are done, the third row decodes as if alone from there on."""
    engine = engine_of(rule, 3, warmup=4)
    decoding = engine.begin(PROMPTS, max_new_tokens=30)
    decoding.step(4)
    for row in decoding.rows[:2]:
        row.end()
    decoding.step(30)
    (alone,) = engine_of("per_row", 1, warmup=4).generate(PROMPTS[2], max_new_tokens=30)
    assert decoding.rows[2].token_ids == alone.token_ids
    assert (decoding.results()[2].skip_map == alone.skip_map).all()
