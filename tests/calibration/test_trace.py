"""The trace map against the skip map that it shows."""

import numpy as np
import pytest
from rich.console import Console

from skipkernels.calibration.trace import GLYPHS, Cell, TraceMap, legend, render
from skipkernels.decoding.generation import Generation
from skipkernels.skipping.policy import FixedPolicy, NeuronPolicy, Policy, SkipPolicy
from tests.models import byte_tokenizer, random_prompt, tiny_engine, tiny_module

LAYERS, TOKENS = 24, 20


def generation(policy: Policy) -> Generation:
    engine = tiny_engine(module=tiny_module(num_hidden_layers=LAYERS), neuron_rows=True)
    return engine.generate([random_prompt(5)], max_new_tokens=TOKENS, eos_token_ids=(), policy=policy)[0]


@pytest.fixture(scope="module")
def skipping() -> Generation:
    return generation(SkipPolicy(threshold=0.95, span=3, warmup_tokens=4))


def lines(trace: TraceMap, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render(trace, width), soft_wrap=True, end="")
    return capture.get().splitlines()


def test_cells_are_the_skip_map(skipping: Generation) -> None:
    trace = TraceMap.of(skipping, byte_tokenizer())
    np.testing.assert_array_equal(trace.skipped, skipping.skip_map)
    assert trace.skipped.any()
    assert len(trace.tokens) == TOKENS


def test_a_trigger_ran_reached_the_threshold_and_was_followed_by_a_skip(skipping: Generation) -> None:
    trace = TraceMap.of(skipping, None)
    triggered = np.argwhere(trace.cells == Cell.TRIGGERED)
    for token, layer in triggered:
        assert skipping.similarity_map[token, layer] >= 0.95
        assert not skipping.skip_map[token, layer]
        assert skipping.skip_map[token, layer + 1]
    starts = (~skipping.skip_map[:, :-1] & skipping.skip_map[:, 1:]).sum()
    assert len(triggered) == starts > 0


def test_a_fixed_policy_has_no_triggers() -> None:
    trace = TraceMap.of(generation(FixedPolicy(layers=(3, 4, 9), warmup_tokens=2)), None)
    assert set(np.unique(trace.cells)) == {Cell.RUN, Cell.SKIPPED}


def test_one_line_a_token_one_character_a_layer(skipping: Generation) -> None:
    trace = TraceMap.of(skipping, byte_tokenizer())
    printed = lines(trace, 80)
    assert len(printed) == 2 + TOKENS + 1
    for line, cells in zip(printed[2:-1], trace.cells, strict=True):
        assert line[20 : 20 + LAYERS] == "".join(GLYPHS[Cell(cell)][0] for cell in cells)
        assert line.split()[-1] == f"{(cells == Cell.SKIPPED).mean():.0%}"
    assert max(map(len, printed)) <= 80


def test_layers_that_do_not_fit_follow_in_another_block(skipping: Generation) -> None:
    trace = TraceMap.of(skipping, byte_tokenizer())
    printed = lines(trace, 42)
    assert len(printed) > 2 * TOKENS
    assert max(map(len, printed)) <= 42


def test_neurons_left_out_are_shown_by_the_share_of_bytes_read() -> None:
    rule = {"gate_thresholds": (0.0,) * 12 + (0.3,) * 12, "product_thresholds": (0.0,) * 24}
    trace = TraceMap.of(generation(NeuronPolicy(**rule, warmup_tokens=3)), byte_tokenizer())
    assert not trace.skipped.any()
    assert (trace.left_out[3:, 12:] > 0).all()
    assert not trace.left_out[:3].any()
    printed = lines(trace, 80)
    assert set(printed[2][20:44]) == {"█"}
    for line, shares in zip(printed[5:-1], trace.unread[3:], strict=True):
        assert line[20:32] == "█" * 12
        assert set(line[32:44]) <= set("▁▂▃▄▅▆▇")
        assert line.split()[-1] == f"{shares.mean():.0%}"
    assert "left out neurons" in legend(trace).plain
    assert "skipped" not in legend(trace).plain


def test_control_characters_are_made_visible() -> None:
    shown = TraceMap.of(
        Generation(
            [10, 9, 65], "\n\tA", "length", 1, np.zeros((3, 2), bool), *[np.zeros((3, 2), np.float32)] * 2, 0.1, []
        ),
        byte_tokenizer(),
    )
    assert shown.tokens == ("⏎", "⇥", "A")
