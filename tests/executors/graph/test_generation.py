"""Whole generations through captured graphs are those of the reference, in every mode."""

from __future__ import annotations

import pytest
import torch

from skipkernels import SamplingParams, SkipPolicy
from skipkernels.errors import DeviceError
from skipkernels.executors.graph import AHEAD, GraphExecutor
from skipkernels.skipping.policy import DensePolicy, FixedPolicy, NeuronPolicy, Policy, RandomPolicy
from tests.executors.graph.conftest import FakeDevice, GpuEngine
from tests.models import byte_tokenizer, random_prompt, tiny_engine

MODES = [(conditional, loop) for conditional in ("predicate", "if_node") for loop in ("replay", "while")]
POLICIES: list[Policy] = [
    DensePolicy(),
    SkipPolicy(threshold=0.6, span=1, cold_start=0, cold_end=1, warmup_tokens=3),
    SkipPolicy(threshold=0.6, span=1, cold_start=0, cold_end=0, warmup_tokens=2, target_ratio=0.2),
    FixedPolicy((1, 2), warmup_tokens=2),
    RandomPolicy(0.4, seed=7, warmup_tokens=1),
    NeuronPolicy(gate_thresholds=(5e-3,) * 4, product_thresholds=(1e-3,) * 4, warmup_tokens=2),
    FixedPolicy((1,), gate_thresholds=(5e-3,) * 4, warmup_tokens=2),
]
SKIPPING = POLICIES[1]
PROMPTS = [random_prompt(9, 1), random_prompt(4, 2), random_prompt(17, 3)]
SAMPLING = [SamplingParams(), SamplingParams(temperature=0.8, seed=5), SamplingParams(temperature=1.0, top_k=20)]


@pytest.mark.parametrize(("conditional", "loop"), MODES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.label)
def test_every_mode_decodes_as_the_reference(
    gpu_engine: GpuEngine, policy: Policy, conditional: str, loop: str
) -> None:
    options = {"policy": policy, "max_batch_size": 3}
    expected = tiny_engine(executor="reference", **options).generate(PROMPTS, max_new_tokens=8, sampling=SAMPLING)
    actual = gpu_engine(conditional, loop, **options).generate(PROMPTS, max_new_tokens=8, sampling=SAMPLING)
    for ours, reference in zip(actual, expected, strict=True):
        assert ours.token_ids == reference.token_ids
        assert ours.skip_map.tolist() == reference.skip_map.tolist()
        assert ours.unread_map.tolist() == reference.unread_map.tolist()
        assert len(ours.seconds_per_token) == 8
    assert isinstance(policy, DensePolicy) or any(answer.unread_ratio > 0 for answer in actual)


@pytest.mark.parametrize("loop", ["replay", "while"])
def test_rows_end_when_they_are_done(gpu_engine: GpuEngine, device: FakeDevice, loop: str) -> None:
    """One row ends by its length, another by an end-of-sequence token, and nothing decodes after the last."""
    expected = tiny_engine().generate(PROMPTS[:1], max_new_tokens=12)[0].token_ids
    engine = gpu_engine(loop=loop)
    eos = expected[5]
    (answer,) = engine.generate(PROMPTS[:1], eos_token_ids=[eos])
    assert answer.token_ids == expected[: expected.index(eos) + 1]
    assert answer.finish_reason == "stop"
    steps = device.controls.kernels.count("advance_kernel") or sum(
        "advance" in name for name in device.controls.kernels
    )
    assert steps <= len(answer.token_ids) + AHEAD + 1  # and the launch that warms up


@pytest.mark.parametrize("loop", ["replay", "while"])
def test_a_stream_gives_token_by_token(gpu_engine: GpuEngine, loop: str) -> None:
    engine = gpu_engine(loop=loop, policy=SKIPPING)
    (expected,) = engine.generate(PROMPTS[:1], max_new_tokens=12)
    chunks = list(engine.stream(PROMPTS[0], max_new_tokens=12))
    assert [chunk.token_id for chunk in chunks[:-1]] == expected.token_ids
    assert chunks[-1].generation is not None
    assert chunks[-1].generation.token_ids == expected.token_ids
    assert chunks[-1].generation.skip_map.tolist() == expected.skip_map.tolist()


@pytest.mark.parametrize("loop", ["replay", "while"])
def test_a_stop_string_ends_a_row_that_the_device_has_run_beyond(gpu_engine: GpuEngine, loop: str) -> None:
    tokenizer = byte_tokenizer()
    plain = tiny_engine(tokenizer=tokenizer)
    (whole,) = plain.generate([PROMPTS[0]], max_new_tokens=20)
    stop = whole.text[3:5]
    (expected,) = plain.generate([PROMPTS[0]], max_new_tokens=20, stop=[stop])
    engine = gpu_engine(loop=loop, tokenizer=tokenizer, max_batch_size=2)
    for _ in range(2):
        answer, other = engine.generate([PROMPTS[0], PROMPTS[1]], max_new_tokens=20, stop=[stop])
        assert (answer.token_ids, answer.text, answer.finish_reason) == (expected.token_ids, expected.text, "stop")
        assert other.token_ids == plain.generate([PROMPTS[1]], max_new_tokens=20, stop=[stop])[0].token_ids


@pytest.mark.parametrize("loop", ["replay", "while"])
def test_an_abandoned_stream_does_not_disturb_the_next_request(gpu_engine: GpuEngine, loop: str) -> None:
    engine = gpu_engine(loop=loop, max_batch_size=2)
    expected = tiny_engine().generate(PROMPTS[1:2], max_new_tokens=10)[0].token_ids
    stream = engine.stream(PROMPTS[0], max_new_tokens=40)
    next(stream)
    assert engine.generate(PROMPTS[1:2], max_new_tokens=10)[0].token_ids == expected


def test_debug_runs_without_a_graph(gpu_engine: GpuEngine, device: FakeDevice) -> None:
    engine = gpu_engine(debug=True, policy=SKIPPING)
    expected = tiny_engine(policy=SKIPPING).generate(PROMPTS[:1], max_new_tokens=6)[0].token_ids
    assert engine.generate(PROMPTS[:1], max_new_tokens=6)[0].token_ids == expected
    assert not [call for call in device.controls.log if call.name == "cudaGraphLaunch"]


def test_an_error_in_a_replay_is_reported_and_debug_names_the_instruction(
    gpu_engine: GpuEngine, device: FakeDevice
) -> None:
    engine = gpu_engine()
    device.controls.inject("cudaGraphLaunch", "cudaErrorIllegalAddress")
    with pytest.raises(DeviceError, match="cudaErrorIllegalAddress"):
        engine.generate(PROMPTS[:1], max_new_tokens=4)
    engine = gpu_engine(debug=True)
    device.controls.inject("cudaLaunchKernelEx", "cudaErrorIllegalAddress", nth=4)
    with pytest.raises(DeviceError, match=r"instruction 3 \(o_proj_add\): .*cudaErrorIllegalAddress"):
        engine.generate(PROMPTS[:1], max_new_tokens=4)


def test_executors_leave_nothing_behind(gpu_engine: GpuEngine, device: FakeDevice) -> None:
    before = device.controls.live
    for number in range(5):
        for conditional, loop in MODES:
            policy = SkipPolicy(threshold=0.5 + 0.01 * number, warmup_tokens=0, cold_start=0, cold_end=0)
            gpu_engine(conditional, loop, policy=policy).generate(PROMPTS[:1], max_new_tokens=3)
    assert device.controls.live == before


def test_several_engines_share_a_device(gpu_engine: GpuEngine) -> None:
    one, two = gpu_engine(), gpu_engine(policy=SKIPPING, loop="while")
    alone = [tiny_engine(policy=policy).generate(PROMPTS[:1], max_new_tokens=8)[0] for policy in (None, SKIPPING)]
    streams = [engine.stream(PROMPTS[0], max_new_tokens=8) for engine in (one, two)]
    tokens: list[list[int]] = [[], []]
    for _ in range(8):
        for stream, taken in zip(streams, tokens, strict=True):
            taken.append(next(stream).token_id)
    assert tokens == [answer.token_ids for answer in alone]


def test_a_profile_changes_nothing(gpu_engine: GpuEngine) -> None:
    engine = gpu_engine(policy=SKIPPING)
    expected = tiny_engine(policy=SKIPPING).generate(PROMPTS[:1], max_new_tokens=10)[0].token_ids
    decoding = engine.begin(PROMPTS[0], max_new_tokens=10)
    decoding.step(4)
    executor = engine.executor_for(engine.policy)
    assert isinstance(executor, GraphExecutor)
    before = {name: buffer.clone() for name, buffer in engine.state.buffers() if not name.endswith("_cache")}
    profile = executor.profile(2)
    assert [op for op, _ in profile] == [ins.op for ins in executor.program]
    assert all(seconds > 0 for _, seconds in profile)
    for name, buffer in before.items():
        assert torch.equal(buffer.nan_to_num(), getattr(engine.state, name).nan_to_num()), name
    decoding.step(96)
    assert decoding.rows[0].token_ids == expected
