"""Requests join and leave one engine's steps: each is answered as the engine answers it alone."""

import asyncio
import dataclasses
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from skipkernels.chat.chat import Completion
from skipkernels.chat.engine_worker import EngineWorker
from skipkernels.chat.progress import ChatInputs
from skipkernels.chat.text_format import TextPrompt
from skipkernels.chat.text_model import TextModel, exact_match
from skipkernels.engine import Engine
from skipkernels.modality.errors import JobFailed
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy
from tests.chat.test_text_model import DENSE, LAYERS, POLICIES, SKIPS, Recorded, prompts
from tests.models import tiny_engine, tiny_module


@pytest.fixture(scope="module")
def engine(tokenizer: PreTrainedTokenizerBase) -> Engine:
    return tiny_engine(
        module=tiny_module(num_hidden_layers=LAYERS), tokenizer=tokenizer, max_batch_size=4, max_seq_len=200
    )


@pytest.fixture(scope="module")
def model(engine: Engine) -> TextModel:
    return TextModel("tiny", engine, POLICIES, exact_match)


def alone(engine: Engine, prompt: TextPrompt, level: float) -> Completion:
    (one,) = engine.generate(
        [prompt.token_ids],
        max_new_tokens=prompt.max_new_tokens,
        sampling=prompt.sampling,
        stop=prompt.stop,
        policy=POLICIES[level],
    )
    return Completion(one.text, one.finish_reason, one.prompt_tokens, len(one.token_ids), pytest.approx(one.skip_ratio))


def test_each_request_is_answered_as_the_engine_answers_it_alone(model: TextModel, engine: Engine) -> None:
    asked = prompts(4)
    progress = [Recorded() for _ in asked]
    strategies = [DENSE, SKIPS, SKIPS, DENSE]

    async def ask() -> list[Completion]:
        worker = EngineWorker(model)
        assert worker.slots == 4
        jobs = zip(asked, progress, strategies, strict=True)
        answers = await asyncio.gather(
            *(worker.answer(ChatInputs({"text": prompt}, one), strategy, 0.0) for prompt, one, strategy in jobs)
        )
        await worker.close()
        return answers

    answers = asyncio.run(ask())
    for prompt, one, answer, strategy in zip(asked, progress, answers, strategies, strict=True):
        expected = alone(engine, prompt, strategy.skip_level)
        for name in ("text", "finish_reason", "prompt_tokens", "new_tokens", "skip_ratio"):
            assert getattr(answer, name) == getattr(expected, name)
        assert len(answer.gaps_ms) == answer.new_tokens - 1
        assert (answer.bytes_not_read > 0) == (answer.skip_ratio > 0)
        assert "".join(one.pieces) == answer.text
        assert one.restarts == 1


def test_bytes_not_read_are_also_those_of_single_neurons(tokenizer: PreTrainedTokenizerBase) -> None:
    module = tiny_module(num_hidden_layers=LAYERS)
    engine = tiny_engine(module=module, tokenizer=tokenizer, max_seq_len=200, neuron_rows=True)
    all_of_them = NeuronPolicy(product_thresholds=(1e9,) * LAYERS, warmup_tokens=1)  # nothing of down_proj is read
    (prompt,) = prompts(1)

    async def ask() -> Completion:
        worker = EngineWorker(TextModel("tiny", engine, {0.0: DensePolicy(), 0.3: all_of_them}, exact_match))
        answer = await worker.answer(ChatInputs({"text": prompt}, Recorded()), SKIPS, 0.0)
        await worker.close()
        return answer

    answer = asyncio.run(ask())
    assert answer.skip_ratio == pytest.approx((answer.new_tokens - 1) / answer.new_tokens / 3)
    down_proj = sum(layer.down_proj.nbytes for layer in engine.weights.layers)
    assert answer.bytes_not_read == pytest.approx((answer.new_tokens - 1) * down_proj, rel=1e-5)


def long_prompt(**fields: Any) -> TextPrompt:
    return dataclasses.replace(prompts(1)[0], stop=(), **fields)


def test_a_short_answer_does_not_wait_for_a_long_one(model: TextModel) -> None:
    async def ask() -> None:
        worker = EngineWorker(model)
        slow_progress = Recorded()
        slow = asyncio.create_task(
            worker.answer(ChatInputs({"text": long_prompt(max_new_tokens=190)}, slow_progress), DENSE, 0.0)
        )
        while not slow_progress.pieces:
            await asyncio.sleep(0)
        quick = await worker.answer({"text": long_prompt(max_new_tokens=3)}, DENSE, 0.0)
        assert quick.new_tokens == 3
        assert not slow.done()
        assert (await slow).new_tokens == 190
        await worker.close()

    asyncio.run(ask())


def test_who_leaves_is_ended_and_a_move_takes_effect_on_the_way(model: TextModel, engine: Engine) -> None:
    async def ask() -> tuple[Completion, Completion]:
        worker = EngineWorker(model)
        left, moved = (ChatInputs({"text": long_prompt(max_new_tokens=190)}, Recorded()) for _ in range(2))
        tasks = [asyncio.create_task(worker.answer(inputs, DENSE, 0.0)) for inputs in (left, moved)]
        while not (left.progress.pieces and moved.progress.pieces):
            await asyncio.sleep(0)
        worker.drop(left)
        worker.move(moved, SKIPS)
        worker.drop({})  # of nobody
        answers = await asyncio.gather(*tasks)
        await worker.close()
        return answers[0], answers[1]

    dropped, changed = asyncio.run(ask())
    assert dropped.new_tokens < 190
    assert changed.new_tokens == 190
    assert changed.skip_ratio > 0.0
    assert alone(engine, long_prompt(max_new_tokens=190), 0.0).skip_ratio == 0.0  # its blocks are nobody else's


def test_a_failing_engine_fails_what_runs_and_goes_on(model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = model.engine.loop.step
    fails = [True]

    def step(wish: int | None = None) -> bool:
        if fails and fails.pop():
            raise OSError("it was told to fail")
        return steps(wish)

    monkeypatch.setattr(model.engine.loop, "step", step)

    async def ask() -> None:
        worker = EngineWorker(model)
        with pytest.raises(JobFailed, match="told to fail"):
            await worker.answer({"text": long_prompt(max_new_tokens=5)}, DENSE, 0.0)
        assert (await worker.answer({"text": long_prompt(max_new_tokens=5)}, DENSE, 0.0)).new_tokens == 5
        await worker.close()

    asyncio.run(ask())
    assert model.engine.loop.idle
