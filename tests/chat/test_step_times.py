"""What a step takes, by its rows, what they have cached, and its tokens of prompts."""

import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.chat import step_times
from skipkernels.chat.step_times import measure_steps
from skipkernels.chat.text_model import TextModel, shared_prefix
from skipkernels.engine import Engine
from skipkernels.modality.strategy import Strategy
from skipkernels.skipping.policy import DensePolicy
from tests.models import tiny_engine, tiny_module

ROW_S, POSITION_S, PROMPT_S = 0.005, 50e-6, 1e-3
"""Far more than the model's own: so long each step is made to take."""


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> TextModel:
    engine: Engine = tiny_engine(
        module=tiny_module(num_hidden_layers=2), tokenizer=tokenizer, max_batch_size=4, max_seq_len=400
    )
    return TextModel("tiny", engine, {0.0: DensePolicy()}, shared_prefix)


@pytest.mark.serial
def test_each_part_of_a_step_is_found(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = model.engine.loop
    take_off = loop._take_off

    def slow(flight: Any) -> None:
        rows = [row.sequence for row in flight.step.decode_rows]
        cached = sum(row.num_cached for row in rows)
        time.sleep(ROW_S * len(rows) + POSITION_S * cached + PROMPT_S * flight.step.num_prompt_rows)
        take_off(flight)

    monkeypatch.setattr(loop, "_take_off", slow)
    monkeypatch.setattr("skipkernels.chat.step_times.STEPS_AT_ONCE", 1)  # else one take-off is many steps
    found = measure_steps(model, Strategy(("text",)), 4)
    assert [rows for rows, _ in found.decode_ms] == [1, 2, 3, 4]
    for rows, ms in found.decode_ms:
        assert 1e3 * ROW_S * rows <= ms <= 2 * 1e3 * (ROW_S + POSITION_S * found.positions) * rows
    assert found.position_ms == pytest.approx(1e3 * POSITION_S, rel=0.5)
    assert found.prompt_ms == pytest.approx(1e3 * PROMPT_S, rel=0.5)
    assert found.prompt_rows >= 1.0
    assert loop.idle, "nothing goes on for nothing"


def test_numbers_of_rows_have_the_stairs_of_the_kernels() -> None:
    assert step_times._numbers(1) == [1]
    assert step_times._numbers(6) == [1, 2, 3, 4, 5, 6]
    assert step_times._numbers(16) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16]
    assert step_times._numbers(11) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]


def test_it_ends_at_once_where_somebody_wants_the_model(model: TextModel) -> None:
    measure_steps(model, Strategy(("text",)), 4, lambda: True)
    assert model.engine.loop.idle


@pytest.mark.parametrize("checks", [1, 3, 50])
def test_no_step_runs_after_somebody_wants_the_model(
    model: TextModel, monkeypatch: pytest.MonkeyPatch, checks: int
) -> None:
    asked, late = 0, 0
    step = model.engine.loop.step

    def disturbed() -> bool:
        nonlocal asked
        asked += 1
        return asked >= checks

    def counted(wish: int | None = None) -> bool:
        nonlocal late
        late += asked >= checks
        return step(wish)

    monkeypatch.setattr(model.engine.loop, "step", counted)
    measure_steps(model, Strategy(("text",)), 4, disturbed)
    assert late == 0
