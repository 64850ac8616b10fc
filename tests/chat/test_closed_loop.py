"""What a request takes while others share its steps."""

import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.chat.closed_loop import closed_loop_ms
from skipkernels.chat.text_format import TextPrompt
from skipkernels.chat.text_model import TextModel, shared_prefix
from skipkernels.engine import Engine
from skipkernels.modality.strategy import Strategy
from skipkernels.skipping.policy import DensePolicy
from tests.models import tiny_engine, tiny_module

TOKENS, STEP_S = 40, 0.004


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    return tiny_engine(module=tiny_module(num_hidden_layers=2), tokenizer=tokenizer, max_batch_size=4, max_seq_len=200)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_request_takes_its_steps_however_many_share_them(
    engine: Engine, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = TextModel("tiny", engine, {0.0: DensePolicy()}, shared_prefix)
    step, submit = engine.loop.step, engine.submit
    flights: list[int] = []
    handles: list[Any] = []

    def noted(*args: Any, **options: Any) -> Any:
        handles.append(submit(*args, **options))
        return handles[-1]

    def slow(wish: int | None = None) -> bool:
        flights.append(sum(handle.running for handle in handles))
        time.sleep(STEP_S)
        return step(wish)

    monkeypatch.setattr(engine.loop, "step", slow)
    monkeypatch.setattr(engine, "submit", noted)
    inputs = [{"text": TextPrompt((number + 1, 2, 3), TOKENS, eos_token_ids=())} for number in range(2 * size - 1)]
    taken_ms = closed_loop_ms(model, inputs, Strategy(("text",)), size)
    assert 0.95 * TOKENS * STEP_S <= taken_ms / 1e3 <= 2 * TOKENS * STEP_S
    assert set(flights) == {size}, "as many are in flight all the time"
    assert len(handles) == 2 * size - 1
    assert not any(handle.running for handle in handles), "nobody goes on for nothing"
    assert engine.loop.idle
