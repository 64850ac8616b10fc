"""Training: the same weights however often it is interrupted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from skipkernels.demo.batches import COMPLETION_WEIGHT, PROMPT_WEIGHT, TEXT_WEIGHT, Batches
from skipkernels.demo.evaluate import bits_per_byte, exact_match
from skipkernels.demo.facts import Fact
from skipkernels.demo.model import initial_model, model_config
from skipkernels.demo.tokenizer import train_tokenizer
from skipkernels.demo.trainer import Schedule, Trainer
from skipkernels.errors import ModelError

DOCUMENTS = [f"Return item number {number} of the sequence, or raise an error." for number in range(20)]
FACTS = [Fact(f"What is the capital of {name}?", name[::-1], "capitals") for name in ("Here", "There", "Nowhere")]
SCHEDULE = Schedule(steps=8, warmup_steps=2, decay_steps=4, step_tokens=64, length=16, decay_length=32)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(DOCUMENTS, vocab_size=300, max_length=64)


def _trainer(
    tokenizer: PreTrainedTokenizerBase, path: Path, schedule: Schedule = SCHEDULE, hidden: int = 16
) -> Trainer:
    model = initial_model(model_config(tokenizer, layers=2, hidden=hidden, context=64), seed=0)
    return Trainer(model, Batches(tokenizer, DOCUMENTS, FACTS, seed=0), schedule, path)


def test_resumed_training_gives_the_same_bits(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    whole = _trainer(tokenizer, tmp_path / "whole.pt")
    whole.run(SCHEDULE.steps, lambda loss: False)
    for until in (3, 6, SCHEDULE.steps):
        part = _trainer(tokenizer, tmp_path / "parts.pt")
        part.run(until, lambda loss: False)
        part.save()
    assert part.step == whole.step == SCHEDULE.steps
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, part.model.state_dict()[name]), name


def test_training_stops_when_it_is_told_to(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trainer = _trainer(tokenizer, tmp_path / "trainer.pt")
    trainer.run(SCHEDULE.steps, lambda loss: trainer.step == 2)
    assert trainer.step == 2
    assert trainer.seconds > 0


def test_another_schedule_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    _trainer(tokenizer, tmp_path / "trainer.pt").save()
    with pytest.raises(ModelError, match="another folder"):
        _trainer(tokenizer, tmp_path / "trainer.pt", Schedule())


def test_more_steps_may_be_asked_for_until_the_decay_starts() -> None:
    longer = replace(SCHEDULE, steps=10)
    assert SCHEDULE.decay_start == 4
    assert longer.continues(SCHEDULE, step=4)
    assert not longer.continues(SCHEDULE, step=5)
    assert SCHEDULE.continues(longer, step=4)
    assert not SCHEDULE.continues(longer, step=5)
    assert SCHEDULE.continues(SCHEDULE, step=8)


def test_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [SCHEDULE.rate(step) / SCHEDULE.learning_rate for step in range(SCHEDULE.steps + 1)]
    assert rates == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [SCHEDULE.row_length(step) for step in (0, 3, 4, 7)] == [16, 16, 32, 32]


def test_batches_depend_on_the_step_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    batches = Batches(tokenizer, DOCUMENTS, FACTS, seed=0)
    tokens, weights = batches.draw(5, rows=4, length=64)
    batches.draw(6, rows=4, length=64)
    again, _ = Batches(tokenizer, DOCUMENTS, FACTS, seed=0).draw(5, rows=4, length=64)
    assert torch.equal(tokens, again)
    assert tokens.shape == (4, 65)
    assert weights.shape == (4, 64)
    assert weights[0].unique().tolist() == pytest.approx([PROMPT_WEIGHT, COMPLETION_WEIGHT])
    assert weights[1].unique().tolist() == [TEXT_WEIGHT]


@pytest.mark.slow
def test_a_tiny_model_learns_its_facts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    schedule = Schedule(steps=300, warmup_steps=10, decay_steps=150, step_tokens=256, length=64, decay_length=64)
    trainer = _trainer(tokenizer, tmp_path / "trainer.pt", schedule, hidden=64)
    before = bits_per_byte(trainer.model, tokenizer, DOCUMENTS)
    assert exact_match(trainer.model, tokenizer, FACTS) == 0
    trainer.run(schedule.steps, lambda loss: False)
    assert exact_match(trainer.model, tokenizer, FACTS) == 1
    assert bits_per_byte(trainer.model, tokenizer, DOCUMENTS) < before / 2
