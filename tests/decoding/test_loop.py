"""Requests through one loop: whatever shares their steps, however their prompts are cut and their blocks come and go,
each gets bit for bit what it gets alone; and nothing is lost or left behind."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipkernels.decoding.generation import Generation, SamplingParams
from skipkernels.decoding.handle import Handle
from skipkernels.engine import Engine
from skipkernels.errors import RequestError
from skipkernels.program.program import Variant
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, Policy, RandomPolicy, SkipPolicy
from tests.models import random_prompt, stock_tokens, tiny_engine, tiny_module

MODULE = tiny_module("mistral with a sliding window", num_hidden_layers=4)
BLOCK_BYTES = 4 * 2 * 2 * 32 * 10 * 4  # layers, keys and values, heads, positions, head_dim, fp32
LONG = random_prompt(150, seed=77)
POLICIES: list[Policy] = [
    DensePolicy(),
    SkipPolicy(threshold=0.75, span=1, cold_start=0, cold_end=0, warmup_tokens=2),
    SkipPolicy(threshold=0.5, span=2, cold_start=0, cold_end=1, warmup_tokens=0),
    SkipPolicy(span=2, cold_start=0, cold_end=0, warmup_tokens=1, target_ratio=0.3),
    FixedPolicy((1, 2), warmup_tokens=1),
    RandomPolicy(0.4, seed=3, cold_start=0, cold_end=0, warmup_tokens=0),
]


def engine_of(monkeypatch: pytest.MonkeyPatch | None = None, prompt_rows: int = 240, **options: Any) -> Engine:
    if monkeypatch is not None:
        monkeypatch.setattr("skipkernels.engine.PROMPT_ROWS", prompt_rows)
    engine = tiny_engine(module=MODULE, max_seq_len=256, **options)
    engine.loop.weights_may_change = False  # nobody changes them here
    return engine


@dataclass(frozen=True)
class Ask:
    """One request. Prompts share their beginnings."""

    prompt_tokens: int
    new_tokens: int
    policy: int
    seed: int | None

    def submit(self, engine: Engine) -> Handle:
        sampling = SamplingParams() if self.seed is None else SamplingParams(temperature=1.1, seed=self.seed)
        return engine.submit(
            LONG[: self.prompt_tokens],
            max_new_tokens=self.new_tokens,
            sampling=sampling,
            policy=POLICIES[self.policy],
            eos_token_ids=(),
        )


asks = st.builds(
    Ask,
    prompt_tokens=st.sampled_from([1, 2, 5, 31, 32, 33, 64, 65, 90, 150]),
    new_tokens=st.sampled_from([1, 3, 20, 40]),
    policy=st.integers(0, len(POLICIES) - 1),
    seed=st.sampled_from([None, 1, 2]),
)
_alone: dict[tuple[str, Ask], Generation] = {}


def alone(ask: Ask, executor: str = "cpu") -> Generation:
    """The answer of an engine that has served nobody else."""
    if (executor, ask) not in _alone:
        _alone[executor, ask] = ask.submit(engine_of(executor=executor)).result()
    return _alone[executor, ask]


def assert_same(answer: Generation, expected: Generation) -> None:
    assert answer.token_ids == expected.token_ids
    assert (answer.skip_map == expected.skip_map).all()
    assert answer.similarity_map.tobytes() == expected.similarity_map.tobytes()  # bit for bit


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    requests=st.lists(st.tuples(asks, st.integers(0, 5)), min_size=1, max_size=7),
    sequences=st.integers(1, 5),
    prompt_rows=st.sampled_from([1, 7, 40, 240]),
    blocks=st.sampled_from([8, 10, 16, 40]),
    num_threads=st.sampled_from([1, 2]),
)
def test_every_request_gets_what_it_gets_alone(
    monkeypatch: pytest.MonkeyPatch,
    requests: list[tuple[Ask, int]],
    sequences: int,
    prompt_rows: int,
    blocks: int,
    num_threads: int,
) -> None:
    """Requests come in between the steps of others; 8 blocks hold one long sequence, so that others are preempted."""
    engine = engine_of(
        monkeypatch,
        prompt_rows,
        max_batch_size=sequences,
        cache_bytes=blocks * BLOCK_BYTES,
        num_threads=num_threads,
    )
    handles = []
    for ask, steps in requests:
        handles.append(ask.submit(engine))
        for _ in range(steps):
            engine.loop.step(1)
    for (ask, _), handle in zip(requests, handles, strict=True):
        assert_same(handle.result(), alone(ask))
    assert engine.loop.pool.num_used == 0
    assert engine.loop.idle


@pytest.mark.parametrize("policy", range(len(POLICIES)))
def test_the_reference_does_not_look_at_who_shares_a_step_either(monkeypatch: pytest.MonkeyPatch, policy: int) -> None:
    engine = engine_of(monkeypatch, 3, max_batch_size=3, cache_bytes=8 * BLOCK_BYTES, executor="reference")
    requests = [Ask(5, 8, policy, None), Ask(33, 6, 0, 1), Ask(31, 7, policy, 2)]
    handles = [ask.submit(engine) for ask in requests]
    for ask, handle in zip(requests, handles, strict=True):
        assert_same(handle.result(), alone(ask, "reference"))


def test_a_preempted_sequence_is_computed_again_bit_for_bit() -> None:
    """Two answers that need five blocks each share eight: the second one gives its blocks up in the middle."""
    engine = engine_of(max_batch_size=2, cache_bytes=8 * BLOCK_BYTES)
    requests = [Ask(65, 90, policy, None) for policy in (1, 3)]
    handles = [ask.submit(engine) for ask in requests]
    preempted = 0
    while engine.loop.step(1):
        preempted += sum(handle.sequence.status == "preempted" for handle in handles)
    assert preempted, "the cache was large enough for both"
    for ask, handle in zip(requests, handles, strict=True):
        assert_same(handle.result(), alone(ask))


def test_a_prompt_that_was_there_before_is_not_computed_again() -> None:
    engine = engine_of(max_batch_size=2)
    ask = Ask(150, 3, 0, None)
    first = ask.submit(engine)
    first.result()
    again = ask.submit(engine)
    engine.loop.step(1)
    assert again.sequence.num_cached >= 128 + 1
    steps = 0
    while again.running:
        engine.loop.step(1)
        steps += 1
    assert steps == 2, "no step went into the prompt"
    assert_same(again.result(), alone(ask))


def test_blocks_written_under_a_policy_are_not_shared_with_another() -> None:
    """The same prompt and generated tokens, as a prompt: a dense request may reuse what was prompt, no more."""
    engine = engine_of()
    skipping = Ask(33, 40, 2, None)
    tokens = LONG[:33] + skipping.submit(engine).result().token_ids
    handle = engine.submit(tokens, max_new_tokens=4, policy=DensePolicy(), eos_token_ids=())
    engine.loop.step(1)
    fresh = engine_of().submit(tokens, max_new_tokens=4, policy=DensePolicy(), eos_token_ids=())
    assert handle.result().token_ids == fresh.result().token_ids
    assert torch.isfinite(engine.state.logits).all()


def test_a_policy_may_change_on_the_way() -> None:
    """What was generated stays; what follows skips; and its blocks are shared with nobody."""
    engine = engine_of()
    dense, changed = Ask(33, 60, 0, None), Ask(33, 60, 0, None).submit(engine)
    engine.loop.step(10)
    had = len(changed.token_ids)
    changed.set_plan(engine.plan_of(POLICIES[2]))
    answer = changed.result()
    changed.set_plan(None)  # it has ended: nothing
    expected = alone(dense)
    assert answer.token_ids[:had] == expected.token_ids[:had]
    assert not answer.skip_map[:had].any()
    assert answer.skip_map[had:].any()
    assert answer.token_ids != expected.token_ids
    tokens = LONG[:33] + answer.token_ids
    again = engine.submit(tokens, max_new_tokens=4, policy=DensePolicy(), eos_token_ids=())
    fresh = engine_of().submit(tokens, max_new_tokens=4, policy=DensePolicy(), eos_token_ids=())
    assert again.result().token_ids == fresh.result().token_ids


@pytest.mark.parametrize("steps", range(8))
def test_a_cancelled_request_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Before its first step, while its prompt comes in, while it decodes."""
    engine = engine_of(monkeypatch, 20, max_batch_size=2)
    other, ask = Ask(31, 20, 1, None), Ask(90, 40, 0, None)
    kept, cancelled = other.submit(engine), ask.submit(engine)
    for _ in range(steps):
        engine.loop.step(1)
    cancelled.cancel()
    with pytest.raises(RequestError, match="was cancelled"):
        cancelled.result()
    with pytest.raises(RequestError, match="ended already"):
        cancelled.cancel()
    assert_same(kept.result(), alone(other))
    assert engine.loop.pool.num_used == 0
    assert_same(ask.submit(engine).result(), alone(ask))


def test_a_request_may_be_stopped_where_it_is() -> None:
    engine, ask = engine_of(), Ask(5, 40, 1, None)
    handle = ask.submit(engine)
    for _ in range(6):
        engine.loop.step(1)
    handle.stop()
    answer = handle.result()
    assert answer.token_ids == alone(ask).token_ids[:6]
    assert answer.skip_map.shape == (6, 4)
    with pytest.raises(RequestError, match="ended already"):
        handle.stop()


class Fails:
    """An executor whose n-th call fails after it has run; ``calls`` counts those of all."""

    def __init__(self, executor: Any, calls: list[int], fails_at: int) -> None:
        self._executor, self._calls, self._fails_at = executor, calls, fails_at

    def run(self, max_steps: int) -> list[float]:
        seconds = self._executor.run(max_steps)
        self._calls.append(max_steps)
        if len(self._calls) == self._fails_at:
            raise MemoryError("as if")
        return seconds

    def interrupt(self) -> None:
        self._executor.interrupt()


@pytest.mark.parametrize("call", [1, 2, 4, 6])
def test_a_step_that_fails_loses_nobodys_answer(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    engine = engine_of(monkeypatch, 20, max_batch_size=2)
    requests = [Ask(65, 20, policy, None) for policy in (0, 1)]
    handles = [ask.submit(engine) for ask in requests]
    calls: list[int] = []
    for variant in (Variant(), Variant(gated=True)):
        engine._variants[variant] = Fails(engine._variants[variant], calls, call)
    failed = 0
    while not engine.loop.idle:
        try:
            engine.loop.step(2)
        except MemoryError:
            failed += 1
            assert not engine.state.active.any()
    assert failed == 1
    for ask, handle in zip(requests, handles, strict=True):
        assert_same(handle.result(), alone(ask))
    assert engine.loop.pool.num_used == 0


def test_many_threads_share_one_engine() -> None:
    engine = engine_of(max_batch_size=3, cache_bytes=12 * BLOCK_BYTES, num_threads=2)
    requests = [Ask([5, 33, 64, 90][n % 4], 20, n % len(POLICIES), n % 3 or None) for n in range(12)]
    expected = [alone(ask) for ask in requests]
    answers: dict[int, Any] = {}

    def ask_for(number: int) -> None:
        handle = requests[number].submit(engine)
        if number % 2:
            chunks = list(handle)
            answers[number] = chunks[-1].generation
            assert [chunk.token_id for chunk in chunks[:-1]] == chunks[-1].generation.token_ids
        else:
            answers[number] = handle.result()

    threads = [threading.Thread(target=ask_for, args=(number,)) for number in range(len(requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for number, answer in enumerate(expected):
        assert_same(answers[number], answer)


def test_a_short_answer_does_not_wait_for_a_long_one() -> None:
    """First token within two steps and its own prompt; the long one goes on."""
    engine = engine_of(max_batch_size=2)
    long, short = Ask(5, 100, 0, None), Ask(33, 8, 1, None)
    running = long.submit(engine)
    for _ in range(10):
        engine.loop.step(1)
    handle = short.submit(engine)
    steps = 0
    while not handle.token_ids:
        engine.loop.step(1)
        steps += 1
    assert steps <= 2 + 33 // 16 + 1
    assert_same(handle.result(), alone(short))
    assert running.running
    assert_same(running.result(), alone(long))


def test_a_long_call_ends_when_somebody_comes() -> None:
    """A thread decodes thousands of tokens in one call of native code; a second one gets its turn between two steps."""
    module = tiny_module(max_position_embeddings=1 << 18)
    engine = tiny_engine(module=module, max_batch_size=2, max_seq_len=1 << 17)
    tokens = 100_000
    background = engine.submit([1, 2, 3], max_new_tokens=tokens, eos_token_ids=())

    def wait() -> None:
        with pytest.raises(RequestError, match="cancelled"):
            background.result()

    thread = threading.Thread(target=wait)
    thread.start()
    while not background.token_ids and thread.is_alive():
        handle = engine.submit([4, 5], max_new_tokens=2, eos_token_ids=())
        assert len(handle.result().token_ids) == 2
    assert len(background.token_ids) < tokens, "the short request waited for the whole long one"
    background.cancel()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("prompt_tokens", "options", "message"),
    [
        (256, {"max_new_tokens": 2}, "max_new_tokens=2 does not fit: 256 prompt tokens leave room for 1"),
        (257, {}, "the prompt has 257 tokens, the cache holds max_seq_len=256"),
    ],
)
def test_what_can_never_be_served_is_refused_at_once(prompt_tokens: int, options: dict[str, Any], message: str) -> None:
    engine = engine_of(cache_bytes=8 * BLOCK_BYTES)
    with pytest.raises(RequestError, match=message):
        engine.submit(random_prompt(prompt_tokens), **options)
    assert engine.loop.idle


def test_a_cache_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(RequestError, match=r"one sequence of max_seq_len=256 needs 163,840 bytes, cache_bytes=143,360"):
        engine_of(cache_bytes=7 * BLOCK_BYTES)


def test_a_larger_cache_than_the_sequences_need_keeps_prompts() -> None:
    engine = engine_of(cache_bytes=40 * BLOCK_BYTES)
    assert engine.loop.pool.num_blocks == 40
    engine.loop.weights_may_change = False
    prompts = [random_prompt(200, seed) for seed in range(4)]
    for _ in range(2):
        for prompt in prompts:
            engine.generate([prompt], max_new_tokens=1)
    assert engine.loop.cache_status().prefix_hits >= 4 * 160
    assert engine.loop.cache_status().evictions == 0


def test_a_closed_engine_takes_nothing() -> None:
    engine = engine_of()
    handle = Ask(5, 40, 0, None).submit(engine)
    engine.step()
    engine.close()
    with pytest.raises(RequestError, match="was cancelled"):
        handle.result()
    with pytest.raises(RequestError, match="the engine is closed"):
        engine.generate([1, 2])


def test_a_module_changed_in_place_is_followed() -> None:
    """Keys and values of the old weights are not found again, whatever was changed and however."""
    module = tiny_module()
    engine, prompt = tiny_engine(module=module), LONG[:70]
    before = engine.generate(prompt, max_new_tokens=10)[0].token_ids
    module.model.layers[0].self_attn.v_proj.weight.data.mul_(-1.5)
    expected = stock_tokens(module, prompt, 10)
    assert expected != before
    assert engine.generate(prompt, max_new_tokens=10)[0].token_ids == expected


def test_rows_by_hand_need_an_idle_engine() -> None:
    engine = engine_of()
    handle = Ask(5, 4, 0, None).submit(engine)
    with pytest.raises(RequestError, match="requests are in flight"), engine.loop.own_rows():
        pass
    handle.result()
    with engine.loop.own_rows() as own:
        own.begin(0, LONG[:5])
    assert_same(Ask(5, 4, 0, None).submit(engine).result(), alone(Ask(5, 4, 0, None)))


def test_rows_by_hand_find_prompts_that_were_kept() -> None:
    """In their own blocks, in those of another slot, and behind them in those that are idle."""
    engine = engine_of(max_batch_size=2, cache_bytes=40 * BLOCK_BYTES)
    engine.loop.weights_may_change = False
    (whole,) = engine.generate([LONG], max_new_tokens=6, eos_token_ids=())
    hits = engine.loop.scheduler.prefix_hits
    placed: list[int] = []
    with engine.loop.own_rows() as own:
        assert engine.loop.pool.num_available == 40 - 2 * 8
        place = own._prompt_rows.place
        own._prompt_rows.place = lambda chunks: placed.extend(c.end - c.start for c, _ in chunks) or place(chunks)
        own.begin(0, LONG, kept=True)
        own.begin(1, [*LONG[:100], 7, 8, 9], kept=True)
        assert sum(placed) == (149 - 128) + (102 - 96)
        del own._prompt_rows.place
        own.begin(1, LONG)
        own.start()
        engine.executor_for(DensePolicy()).run(6)
        for slot in range(2):
            assert own.state.token_ids[slot, len(LONG) : len(LONG) + 6].tolist() == whole.token_ids
    assert engine.loop.pool.num_used == 0
    assert engine.generate([LONG], max_new_tokens=6, eos_token_ids=())[0].token_ids == whole.token_ids
    assert engine.loop.scheduler.prefix_hits - hits == 128


def test_thousands_of_sequences_leave_the_pool_as_it_was() -> None:
    engine = engine_of(max_batch_size=4, cache_bytes=10 * BLOCK_BYTES)
    lengths = np.random.default_rng(5).integers(1, 60, size=300)
    for some in np.split(lengths, 6):
        handles = [engine.submit(random_prompt(n, seed=n), max_new_tokens=1 + n % 5) for n in some.tolist()]
        for handle in handles:
            handle.result()
    pool = engine.loop.pool
    assert (pool.num_used, pool.num_available) == (0, 10)
    assert (engine.state.active == 0).all()
