"""Work in comparable terms, by hand."""

import numpy as np
import pytest

from skipkernels.methods.work import Work
from tests.models import tiny_engine

# hidden 40, 4 heads and 2 key/value heads of 10, intermediate 72, in bf16
KV, ATTENTION, FFN = 2 * 2 * 20 * 40, 2 * (80 * 40 + 40 * 40), 2 * 3 * 72 * 40
SKIPPED = np.array([[False, True, True, False], [False, True, False, False]])


ENGINE = tiny_engine(dtype="bf16")
WEIGHTS = ENGINE.weights


def test_an_ffn_saves_its_matrices() -> None:
    work = Work.of_ffns(WEIGHTS, SKIPPED)
    assert (work.tokens, work.ffns, work.ffns_skipped) == (2, 8, 3)
    assert work.layer_bytes == 8 * (ATTENTION + FFN)
    assert work.layer_bytes_skipped == 3 * FFN


def test_a_layer_saves_all_but_what_the_cache_needs() -> None:
    assert Work.of_layers(ENGINE.config, WEIGHTS, SKIPPED, fills_cache=False).layer_bytes_saved == 3 / 8
    filled = Work.of_layers(ENGINE.config, WEIGHTS, SKIPPED, fills_cache=True)
    assert filled.layer_bytes_skipped == 3 * (ATTENTION + FFN - KV)
    assert filled.ffn_skip_ratio == 3 / 8


def test_work_adds_up() -> None:
    one = Work.of_ffns(WEIGHTS, SKIPPED)
    two = one + Work.of_ffns(WEIGHTS, ~SKIPPED)
    assert two.tokens == 4
    assert two.ffn_skip_ratio == pytest.approx(0.5)
    assert Work().ffn_skip_ratio == Work().layer_bytes_saved == 0.0
