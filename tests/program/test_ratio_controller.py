"""A held skip ratio stays at its target whatever the similarities are, row by row, in the reference and natively."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from skipkernels.executors import Executor
from skipkernels.executors.cpu import CpuExecutor
from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.model.config import ModelConfig
from skipkernels.model.weights import allocate_weights
from skipkernels.program import Program, build_program
from skipkernels.program.state import DecodeState
from skipkernels.skipping.policy import RAMP_TOKENS, SkipPolicy

LAYERS, TOKENS = 24, 200
WITHIN = 0.02
Similarities = Callable[[int], np.ndarray]
"""The similarities [layers] of a token."""

middle = 1 - np.abs(np.linspace(-1, 1, LAYERS)) * 0.01
SEQUENCES: dict[str, Similarities] = {
    "constant": lambda token: np.full(LAYERS, 0.995),
    "all one": lambda token: np.ones(LAYERS),
    "all zero": lambda token: np.zeros(LAYERS),
    "all opposed": lambda token: -np.ones(LAYERS),
    "alternating by token": lambda token: np.full(LAYERS, 0.9999 if token % 2 else 0.5),
    "alternating by layer": lambda token: np.where(np.arange(LAYERS) % 2 == token % 2, 0.999, 0.9),
    "drifting up": lambda token: 1 - np.full(LAYERS, 0.5 * 0.95**token),
    "drifting down": lambda token: 1 - np.full(LAYERS, 1e-5 * 1.05**token),
    "in blocks of 40": lambda token: np.full(LAYERS, 0.9999 if token // 40 % 2 else 0.3),
    "noise around a hill": lambda token: 1 - (1 - middle) * np.exp(np.random.default_rng(token).normal(0, 0.5, LAYERS)),
}
POLICIES = [
    SkipPolicy(0.9973, span=3, cold_start=4, cold_end=4, warmup_tokens=1, target_ratio=0.25),
    SkipPolicy(0.9973, span=3, cold_start=4, cold_end=4, warmup_tokens=25, target_ratio=0.25),
    SkipPolicy(0.99, span=None, cold_start=1, cold_end=1, warmup_tokens=25, target_ratio=0.3),
    SkipPolicy(0.99, span=1, cold_start=2, cold_end=2, warmup_tokens=8, target_ratio=0.1),
    SkipPolicy(0.99, span=2, warmup_tokens=0, layer_thresholds=(0.9, 1.0) * 12, target_ratio=0.35),
]


def gates(policy: SkipPolicy, rows: int) -> tuple[DecodeState, Program]:
    """A state of ``rows`` rows at their first token, and a step's gates over it with the instruction that ends it."""
    config = ModelConfig(
        model_type="llama",
        hidden_size=2,
        intermediate_size=1,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=2,
        max_position_embeddings=TOKENS + 1,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        qkv_bias=False,
        o_proj_bias=False,
        qk_norm=False,
        sliding_windows=(None,) * LAYERS,
        rope_parameters=(),
    )
    state = DecodeState.allocate(config, batch_size=rows, max_seq_len=TOKENS + 1, dtype=torch.float32)
    for row in range(rows):
        state.begin_row(row, torch.tensor([0], dtype=torch.int32))
    state.max_new_tokens.fill_(TOKENS)
    program = build_program(config, allocate_weights(config, torch.float32, TOKENS + 1), state, policy)
    return state, tuple(ins for ins in program if ins.op in ("skip_gate", "advance"))


def natively(program: Program, state: DecodeState) -> Executor:
    return CpuExecutor(program, state, num_threads=1)


def skipped_ffns(
    policy: SkipPolicy, sequences: list[Similarities], executor: Callable[[Program, DecodeState], Executor] = natively
) -> np.ndarray:
    """How many FFNs each row skips in each of TOKENS tokens, [rows, tokens]."""
    state, program = gates(policy, len(sequences))
    runner = executor(program, state)
    for token in range(TOKENS):
        similarities = torch.tensor(np.stack([sequence(token) for sequence in sequences]), dtype=torch.float32)
        for index, ins in enumerate(program):
            if ins.op == "skip_gate":
                state.similarity_partials[0, :, 0] = similarities[:, int(ins.scalars["layer"]) - 1]
                state.similarity_partials[0, :, 1:] = 1.0
            runner.run_instruction(index)
    return (state.run_map[:, :TOKENS] == 0).sum(dim=2).numpy()


def assert_held(skipped: np.ndarray, policy: SkipPolicy, what: str) -> None:
    target, ramp = policy.target_ratio, policy.ramp_tokens(LAYERS)
    assert target is not None
    assert not skipped[: max(1, policy.warmup_tokens)].any(), f"{what}: skipped in the warm-up"
    tokens = np.arange(1, TOKENS + 1)
    error = np.abs(np.cumsum(skipped) / (LAYERS * tokens) - target)
    promised = (0.5 + target) / tokens + 1e-4  # fp32
    assert (error <= promised)[ramp - 1 :].all(), f"{what}: off by {error[ramp - 1 :].max():.4f}"
    assert error[max(ramp, RAMP_TOKENS) - 1 :].max() <= WITHIN, f"{what}: off by {error[ramp - 1 :].max():.4f}"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.label}, warm-up {policy.warmup_tokens}")
def test_the_ratio_holds_on_every_sequence(policy: SkipPolicy) -> None:
    assert policy.ramp_tokens(LAYERS) == RAMP_TOKENS
    skipped = skipped_ffns(policy, list(SEQUENCES.values()))
    for name, counts in zip(SEQUENCES, skipped, strict=True):
        assert_held(counts, policy, name)


def test_native_code_decides_as_the_reference_does() -> None:
    native = skipped_ffns(POLICIES[1], list(SEQUENCES.values()))
    expected = skipped_ffns(POLICIES[1], list(SEQUENCES.values()), ReferenceExecutor)
    for name, counts, reference in zip(SEQUENCES, native, expected, strict=True):
        assert counts.tolist() == reference.tolist(), name


def test_a_row_is_held_alone_as_in_a_batch() -> None:
    sequences = list(SEQUENCES.values())
    together = skipped_ffns(POLICIES[0], sequences)
    for index in (0, 4, 9):
        assert skipped_ffns(POLICIES[0], [sequences[index]])[0].tolist() == together[index].tolist()


def test_similar_layers_are_taken_before_others() -> None:
    """On a hill of similarities the controller finds the level at which the top of the hill is the wanted share."""
    policy = SkipPolicy(0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=1, target_ratio=0.2)
    state, program = gates(policy, 1)
    runner = natively(program, state)
    for _ in range(TOKENS):
        for index, ins in enumerate(program):
            if ins.op == "skip_gate":
                state.similarity_partials[0, 0] = torch.tensor([middle[int(ins.scalars["layer"]) - 1], 1.0, 1.0])
            runner.run_instruction(index)
    skipped = (state.run_map[0, 100:TOKENS] == 0).float().mean(dim=0)
    assert skipped[LAYERS // 2 - 5 : LAYERS // 2 + 5].sum() > 0.8 * skipped.sum()


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_the_ratio_holds_under_any_policy_on_random_similarities(seed: int, data: st.DataObject) -> None:
    policy = SkipPolicy(
        threshold=data.draw(st.sampled_from([-1.0, 0.5, 0.99, 1.0])),
        span=data.draw(st.sampled_from([None, 1, 2, 3, 5])),
        cold_start=data.draw(st.integers(0, 5)),
        cold_end=data.draw(st.integers(0, 5)),
        warmup_tokens=data.draw(st.integers(0, 20)),
    )
    target = data.draw(st.floats(0.02, 0.95)) * policy.reachable_ratio(LAYERS)
    policy = replace(policy, target_ratio=target)
    assume(policy.ramp_tokens(LAYERS) < TOKENS)
    values = np.random.default_rng(seed).choice([-1.0, 0.2, 0.9, 0.999, 1.0], (TOKENS, LAYERS))
    (skipped,) = skipped_ffns(policy, [lambda token: values[token]])
    assert_held(skipped, policy, "random")
