"""Early exit: the confidence, where tokens leave, and the threshold for a ratio."""

from collections.abc import Callable

import pytest
import torch

from skipkernels.calibration.passages import Passage
from skipkernels.errors import PolicyError
from skipkernels.methods.early_exit import ConfidentExit, EarlyExit, confidence
from skipkernels.methods.layer_decoder import EveryLayer
from skipkernels.methods.matching import skip_ratio
from skipkernels.methods.method import Found
from skipkernels.methods.setup import Setup
from tests.methods.conftest import ALIKE, LAYERS, RATIO
from tests.models import random_prompt, tiny_engine, tiny_module
from tests.tolerances import assert_close

PROMPT, TOKENS, WARMUP = 6, 20, 3


def test_the_threshold_zero_leaves_after_the_first_layer() -> None:
    module = tiny_module(num_hidden_layers=LAYERS)
    setup = Setup(tiny_engine(module=module), [], warmup_tokens=WARMUP)
    tokens = random_prompt(PROMPT + TOKENS)
    (reading,) = (
        EarlyExit().build(setup, {"confidence": 0.0}).score([Passage(tuple(tokens), PROMPT)], keep_log_probs=True)
    )
    with torch.inference_mode():
        outputs = module(torch.tensor([tokens]), output_hidden_states=True)
        after_first = module.lm_head(module.model.norm(outputs.hidden_states[1]))[0].log_softmax(-1)
    assert reading.all_log_probs is not None
    start = PROMPT - 1
    full = outputs.logits[0, start : start + WARMUP].log_softmax(-1)
    assert_close(reading.all_log_probs[:WARMUP], full, "logits after layers, fp32", "warm-up")
    early = after_first[start + WARMUP : -1]
    assert_close(reading.all_log_probs[WARMUP:], early, "logits after layers, fp32", "past the warm-up")
    assert reading.work.ffns_skipped == (LAYERS - 1) * (TOKENS - WARMUP)


def test_no_token_leaves_where_nothing_is_sure_enough(setup: Setup) -> None:
    passage = [Passage(tuple(random_prompt(PROMPT + TOKENS)), PROMPT)]
    (reading,) = EarlyExit().build(setup, {"confidence": 1.0 + 1e-6}).score(passage)
    assert reading.work.ffns_skipped == 0


def test_a_token_leaves_at_the_first_layer_that_is_sure(setup: Setup) -> None:
    decoder, tokens = setup.layer_decoder, torch.tensor(random_prompt(40))
    threshold = 0.02
    streams: list[torch.Tensor] = []

    class Watched(ConfidentExit):
        def runs(self, layer: int, hidden: torch.Tensor, ran: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
            streams.append(hidden)
            return super().runs(layer, hidden, ran, step)

    decoder.begin()
    hidden, ran = decoder.read(tokens, Watched(decoder, threshold, warmup_tokens=1), 1)
    depths = ran.sum(dim=1)
    assert len(set(depths.tolist())) > 3
    for token, depth in enumerate(depths.tolist()):
        assert ran[token].tolist() == [layer < depth for layer in range(LAYERS)]
        sure = [float(confidence(decoder, stream[token : token + 1])) for stream in streams[1:depth]]
        assert all(value < threshold for value in sure)
        if depth < LAYERS:
            assert float(confidence(decoder, hidden[token : token + 1])) >= threshold


def test_confidence_is_the_margin_of_the_best_token(setup: Setup) -> None:
    decoder = setup.layer_decoder
    decoder.begin()
    hidden, _ = decoder.read(torch.tensor(random_prompt(3)), EveryLayer(), 0)
    for row, value in zip(decoder.logits(hidden).softmax(-1), confidence(decoder, hidden), strict=True):
        first, second, *_ = row.sort(descending=True).values.tolist()
        assert float(value) == pytest.approx(first - second, abs=1e-6)


def test_the_threshold_skips_the_wanted_share(setup: Setup, found: Callable[[str], Found]) -> None:
    assert skip_ratio(EarlyExit().build(setup, found("exit")).score(ALIKE)) == pytest.approx(RATIO, abs=0.005)


def test_an_impossible_ratio_names_the_reachable_one(setup: Setup) -> None:
    with pytest.raises(PolicyError, match=r"skip at most 0\.675"):  # nine of ten layers in three of four tokens
        EarlyExit().find(setup, 0.7, [Passage((1,) * 6, 2)])
