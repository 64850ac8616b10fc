"""Whole generations from quantised weights through captured graphs of the CUDA kernels."""

from __future__ import annotations

import pytest

from skipkernels.errors import DeviceError
from skipkernels.executors.formats import require_planes_fp32
from skipkernels.model.weights import into_planes
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, Policy, SkipPolicy
from tests.executors.block_case import BlockCase
from tests.executors.gpu_engines import with_fp32_activations
from tests.executors.graph.conftest import GpuEngine
from tests.models import random_prompt, tiny_engine, tiny_module

SIZES = {"hidden_size": 64, "intermediate_size": 96}
SKIPPING = SkipPolicy(threshold=0.6, span=1, cold_start=0, cold_end=1, warmup_tokens=3)
PROMPTS = [random_prompt(9, 1), random_prompt(4, 2)]


@pytest.mark.parametrize("dtype", ["q4_0", "q8_0", "q5_1"])
@pytest.mark.parametrize("policy", [DensePolicy(), SKIPPING], ids=lambda policy: policy.label)
def test_tokens_are_those_of_the_reference(
    gpu_engine: GpuEngine, monkeypatch: pytest.MonkeyPatch, policy: Policy, dtype: str
) -> None:
    """Which takes the blocks as a file holds them and dequantises them with the ``gguf`` package."""
    options = {"dtype": dtype, "policy": policy, "max_batch_size": 2}
    with monkeypatch.context() as patch:
        patch.setattr("skipkernels.executors.variants.build_program", with_fp32_activations)
        reference = tiny_engine(module=tiny_module(**SIZES), executor="reference", **options)
        expected = reference.generate(PROMPTS, max_new_tokens=8)
    engine = gpu_engine(module=tiny_module(**SIZES), **options)
    assert dtype in engine.dtype
    assert engine.weights.layers[0].down_proj.layout == "planes"
    for ours, theirs in zip(engine.generate(PROMPTS, max_new_tokens=8), expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.skip_map.tolist() == theirs.skip_map.tolist()
        assert ours.unread_ratio == theirs.unread_ratio
        assert policy is not SKIPPING or ours.unread_ratio > 0


def test_neurons_of_blocks_are_refused_and_the_message_says_what_to_do(gpu_engine: GpuEngine) -> None:
    with pytest.raises(DeviceError, match="down_proj in q4_0 cannot be left out on a GPU; leave out whole FFN blocks"):
        gpu_engine(dtype="q4_0", policy=NeuronPolicy(gate_thresholds=(5e-3,) * 4), module=tiny_module(**SIZES))


def test_experts_in_blocks_are_refused_and_the_message_says_what_to_do(gpu_engine: GpuEngine) -> None:
    sizes = {**SIZES, "head_dim": 16, "moe_intermediate_size": 32}
    with pytest.raises(DeviceError, match=r"no kernel of experts_gate_up_act for gate_up_proj in q4_0; .*dtype='bf16'"):
        gpu_engine(dtype="q4_0", module=tiny_module("qwen3_moe", **sizes))


def test_what_the_kernels_do_not_compute_is_refused_by_name() -> None:
    case = BlockCase.of("q4_0")
    weights, state = case.weights(arrange=False), case.state()
    program = case.program(weights, state)
    with pytest.raises(DeviceError, match="needs qkv_proj of qkv_rope_append in layout planes, got rows"):
        require_planes_fp32(program[1:], "graph")
    into_planes(weights)
    require_planes_fp32(case.program(weights, state), "graph")
    whole = BlockCase.of("q4_0", "q8_0", qk_norm=True, post_norms_only=True)  # qkv_proj as an o_proj_add
    with pytest.raises(DeviceError, match=r"no kernel of o_proj_add for o_proj in several formats \(q4_0, q8_0\)"):
        require_planes_fp32(whole.program(whole.weights(), whole.state()), "graph")
