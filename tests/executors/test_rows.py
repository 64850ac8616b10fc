"""Rows are tokens: whatever shares a step, a block or a slot, each sequence gets the bits it gets alone."""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipkernels.executors.cpu import CpuExecutor
from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import ModelWeights
from skipkernels.program.state import ENDED, WAITS_FOR_BLOCK
from skipkernels.skipping.policy import FixedPolicy, Policy, RandomPolicy, SkipPolicy
from tests.executors.decoder import Decoder, MakeExecutor, natively, packed
from tests.executors.programs import same_bits
from tests.models import random_prompt, tiny_module

EXECUTORS = pytest.mark.parametrize("executor", [ReferenceExecutor, natively], ids=["reference", "native"])
SLIDING = "mistral with a sliding window"
MODELS = {SLIDING: torch.float32, "qwen3": torch.bfloat16}
PROMPT = random_prompt(23)
OTHER = random_prompt(12, seed=1)
NEW_TOKENS = 6
SKIPS = SkipPolicy(threshold=0.6, span=1, cold_start=0, cold_end=0, warmup_tokens=2)


@cache
def model(family: str) -> tuple[ModelConfig, ModelWeights]:
    return packed(tiny_module(family, dtype=MODELS[family]), 64)


def decoder(executor: MakeExecutor, family: str = SLIDING, **options: Any) -> Decoder:
    return Decoder(*model(family), executor, **options)


def alone(
    executor: MakeExecutor,
    prompt: Sequence[int],
    family: str = SLIDING,
    policy: Policy | None = None,
    new_tokens: int = NEW_TOKENS,
) -> Decoder:
    """A decoder that has generated from a prompt fed token by token, in a step each, with all the blocks it needs."""
    made = decoder(executor, family, num_prompt_rows=1, gated=policy is not None)
    made.begin(0, prompt, policy=policy, new_tokens=new_tokens)
    made.give_blocks(0)
    made.feed(0, prompt[:-1])
    made.decode(0)
    assert made.state.progress[0].tolist() == [new_tokens, ENDED]
    return made


@cache
def prompt_alone(executor: MakeExecutor, family: str) -> Decoder:
    return alone(executor, PROMPT, family)


def assert_same_sequence(actual: Decoder, slot: int, expected: Decoder) -> None:
    """Tokens, what ran for them, the last logits and the whole cache."""
    assert actual.token_ids(slot) == expected.token_ids(0)
    assert torch.equal(actual.state.run_map[slot], expected.state.run_map[0])
    assert same_bits(actual.state.logits[slot], expected.state.logits[0])
    for now, then in zip(actual.cached(slot), expected.cached(0), strict=True):
        assert same_bits(now, then)


@st.composite
def cuts(draw: st.DrawFn, length: int, most: int = 8) -> list[int]:
    """Lengths of at most ``most`` that add up to ``length``."""
    chunks: list[int] = []
    while (left := length - sum(chunks)) > 0:
        chunks.append(draw(st.integers(1, min(most, left))))
    return chunks


@EXECUTORS
@pytest.mark.parametrize("family", MODELS)
@given(chunks=cuts(len(PROMPT) - 1), together=st.booleans(), block_size=st.sampled_from([16, 32, 64]))
def test_a_prompt_may_be_cut_anywhere(
    executor: MakeExecutor, family: str, chunks: list[int], together: bool, block_size: int
) -> None:
    """Bit by bit what its tokens one by one give; the last of them runs with the end of the others, or after it."""
    expected = prompt_alone(executor, family)
    cut = decoder(executor, family, block_size=block_size)
    cut.begin(0, PROMPT, new_tokens=NEW_TOKENS)
    cut.give_blocks(0)
    start = 0
    for number, chunk in enumerate(chunks):
        cut.add_prompt_rows(0, start, PROMPT[start : start + chunk])
        start += chunk
        if together and number == len(chunks) - 1:
            cut.state.start_decoding(0)
        cut.step()
    if not together:
        cut.state.start_decoding(0)
    cut.executor.run(NEW_TOKENS)
    assert_same_sequence(cut, 0, expected)


@pytest.mark.parametrize("num_threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(num_threads: int) -> None:
    expected = prompt_alone(natively, SLIDING)
    threaded = decoder(partial(CpuExecutor, num_threads=num_threads), num_sequences=2, num_prompt_rows=22)
    for slot in (0, 1):
        threaded.begin(slot, PROMPT, new_tokens=NEW_TOKENS)
        threaded.give_blocks(slot)
    threaded.feed(1, PROMPT[:-1])
    threaded.add_prompt_rows(0, 0, PROMPT[:-1])
    threaded.decode(0, 1)
    for slot in (0, 1):
        assert_same_sequence(threaded, slot, expected)


@EXECUTORS
def test_prompt_rows_of_several_sequences_and_decode_rows_share_steps(executor: MakeExecutor) -> None:
    prompts = [PROMPT, OTHER, random_prompt(4, seed=2)]
    shared = decoder(executor, num_sequences=3)
    for slot, prompt in enumerate(prompts):
        shared.begin(slot, prompt, new_tokens=NEW_TOKENS)
        shared.give_blocks(slot)
    shared.add_prompt_rows(2, 0, prompts[2][:-1])
    shared.add_prompt_rows(0, 0, prompts[0][:5])
    shared.state.start_decoding(2)
    shared.step()
    shared.add_prompt_rows(1, 0, prompts[1][:3])
    shared.add_prompt_rows(0, 5, prompts[0][5:9])
    shared.step()
    shared.add_prompt_rows(1, 3, prompts[1][3:11])
    shared.state.start_decoding(1)
    shared.step()
    shared.add_prompt_rows(0, 9, prompts[0][9:17])
    shared.step()
    shared.add_prompt_rows(0, 17, prompts[0][17:22])
    shared.decode(0)
    for slot, prompt in enumerate(prompts):
        assert_same_sequence(shared, slot, alone(executor, prompt))


@EXECUTORS
def test_sequences_of_any_policy_decode_side_by_side(executor: MakeExecutor) -> None:
    policies: list[Policy | None] = [
        None,
        SKIPS,
        SkipPolicy(threshold=0.5, span=2, cold_start=0, cold_end=0, warmup_tokens=1),
        SkipPolicy(threshold=0.8, span=2, cold_start=0, cold_end=0, warmup_tokens=1, target_ratio=0.3),
        SkipPolicy(threshold=0.6, span=None, cold_start=0, cold_end=1, warmup_tokens=0, batch_rule="all"),
        SkipPolicy(threshold=0.7, span=1, cold_start=0, cold_end=0, warmup_tokens=3, batch_rule="majority"),
        FixedPolicy((0, 2), warmup_tokens=2),
        RandomPolicy(0.4, seed=3, cold_start=0, cold_end=0, warmup_tokens=1),
    ]
    prompts = [random_prompt(3 + slot, seed=slot) for slot in range(len(policies))]
    shared = decoder(executor, num_sequences=len(policies), num_prompt_rows=10, gated=True)
    for slot, (prompt, policy) in enumerate(zip(prompts, policies, strict=True)):
        shared.begin(slot, prompt, policy=policy, new_tokens=12)
        shared.give_blocks(slot)
        shared.feed(slot, prompt[:-1])
    shared.decode(*range(len(policies)))
    for slot, (prompt, policy) in enumerate(zip(prompts, policies, strict=True)):
        expected = alone(executor, prompt, policy=policy, new_tokens=12)
        assert_same_sequence(shared, slot, expected)
        assert bool((expected.state.run_map[0, :12] == 0).any()) == (policy is not None)


@EXECUTORS
def test_a_sequence_waits_for_a_block_and_goes_on_as_if_it_had_not(executor: MakeExecutor) -> None:
    """The other sequence goes on meanwhile, and what waits keeps its policy and its place."""
    expected = alone(executor, OTHER, policy=SKIPS, new_tokens=40)
    waiting = decoder(executor, num_sequences=2, num_prompt_rows=30, gated=True)
    for slot, prompt in ((0, OTHER), (1, PROMPT)):
        waiting.begin(slot, prompt, policy=SKIPS, new_tokens=40)
        waiting.give_blocks(slot, positions=16 if slot == 0 else None)
        waiting.feed(slot, prompt[:-1])
    waiting.decode(0, 1)
    for blocks in (2, 3, 4):
        generated = 16 * (blocks - 1) - len(OTHER) + 1
        assert waiting.state.progress.tolist() == [[generated, WAITS_FOR_BLOCK], [40, ENDED]]
        assert waiting.executor.run(1) == [], "a row that waits does not run"
        waiting.state.set_blocks(0, [waiting.free_block()], first=blocks - 1)
        waiting.decode(0)
    assert waiting.state.progress[0].tolist() == [40, ENDED]
    assert_same_sequence(waiting, 0, expected)
    assert_same_sequence(waiting, 1, alone(executor, PROMPT, policy=SKIPS, new_tokens=40))


@EXECUTORS
def test_a_prefix_is_cached_once_for_all_that_share_its_blocks(executor: MakeExecutor) -> None:
    prompts = [PROMPT[:16] + random_prompt(tokens, seed=tokens) for tokens in (1, 5, 11)]
    shared = decoder(executor, num_sequences=3)
    first: list[int] = []
    for slot, prompt in enumerate(prompts):
        shared.begin(slot, prompt, new_tokens=NEW_TOKENS)
        first = shared.give_blocks(slot, shared=first)[:1]
        shared.feed(slot, prompt[:-1], start=16 if slot else 0)
    assert shared.state.block_table[:, 0].unique().numel() == 1
    shared.decode(0, 1, 2)
    for slot, prompt in enumerate(prompts):
        assert_same_sequence(shared, slot, alone(executor, prompt))


@EXECUTORS
def test_a_copied_block_goes_its_own_way(executor: MakeExecutor) -> None:
    """Two sequences with a block in common that is not full: one writes on in a copy."""
    prompts = [PROMPT[:10] + random_prompt(3, seed=seed) for seed in (5, 6)]
    forked = decoder(executor, num_sequences=2)
    blocks = []
    for slot, prompt in enumerate(prompts):
        forked.begin(slot, prompt, new_tokens=NEW_TOKENS)
        blocks.append(forked.give_blocks(slot))
    forked.feed(0, prompts[0][:10])
    forked.state.copy_block(blocks[0][0], blocks[1][0])
    forked.feed(0, prompts[0][:-1], start=10)
    forked.feed(1, prompts[1][:-1], start=10)
    forked.decode(0, 1)
    for slot, prompt in enumerate(prompts):
        assert_same_sequence(forked, slot, alone(executor, prompt))


@EXECUTORS
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_what_was_generated_is_computed_again_as_it_was(executor: MakeExecutor, cut: int) -> None:
    """After some tokens the sequence loses its blocks: its cache, recomputed by prompt rows with the FFNs that had run,
    has the same bits, and it goes on to the same tokens."""
    expected = alone(executor, OTHER, policy=SKIPS, new_tokens=12)
    assert (expected.state.run_map[0, : cut - 1] == 0).any() or cut == 1
    tokens = expected.token_ids(0)[: len(OTHER) + cut]
    again = decoder(executor, gated=True)
    again.begin(0, tokens, policy=SKIPS, new_tokens=12, num_generated=cut)
    again.give_blocks(0)
    again.feed(0, OTHER[:-1])
    # the first of them came out of the row of the prompt's last token
    first = len(OTHER) - 1
    again.add_prompt_rows(0, first, tokens[first:-1], run_map=expected.state.run_map[0, :cut])
    again.step()
    again.state.run_map[0, :cut] = expected.state.run_map[0, :cut]
    again.decode(0)
    assert_same_sequence(again, 0, expected)
