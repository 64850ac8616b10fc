"""fp8 checkpoints through captured graphs of the CUDA kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipkernels.errors import DeviceError
from skipkernels.skipping.policy import DensePolicy, NeuronPolicy, Policy, SkipPolicy
from tests.executors.float8_checkpoint import TILES, as_floats, float8_checkpoint
from tests.executors.graph.conftest import GpuEngine
from tests.models import random_prompt

SKIPPING = SkipPolicy(threshold=0.6, span=1, cold_start=0, cold_end=1, warmup_tokens=3)
PROMPTS = [random_prompt(9, 1), random_prompt(4, 2)]


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("policy", [DensePolicy(), SKIPPING], ids=lambda policy: policy.label)
def test_tokens_are_those_of_the_reference_on_floats(
    gpu_engine: GpuEngine, tmp_path: Path, caplog: pytest.LogCaptureFixture, tiles: str, policy: Policy
) -> None:
    folder, options = float8_checkpoint(tmp_path, tiles), {"policy": policy, "max_batch_size": 2}
    expected = as_floats(folder, PROMPTS, 8, **options)
    caplog.clear()
    engine = gpu_engine(module=folder, **options)
    assert "dequantised" not in caplog.text
    assert engine.dtype == "f8_e4m3+fp32"
    layer = engine.weights.layers[0]
    assert layer.down_proj.nbytes == 128 * 256 * 8.25 / 8
    assert len(layer.qkv_proj.parts) == 1
    for ours, theirs in zip(engine.generate(PROMPTS, max_new_tokens=8), expected, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.skip_map.tolist() == theirs.skip_map.tolist()
        assert policy is not SKIPPING or ours.unread_ratio > 0


def test_single_neurons_are_refused_by_name(gpu_engine: GpuEngine, tmp_path: Path) -> None:
    folder = float8_checkpoint(tmp_path, "tiles")
    with pytest.raises(DeviceError, match="down_proj in f8_e4m3 cannot be left out on a GPU; leave out whole FFN bloc"):
        gpu_engine(module=folder, policy=NeuronPolicy(gate_thresholds=(5e-3,) * 4))
