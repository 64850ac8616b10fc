"""Every op on a GPU does what the reference does: buffers are compared after every instruction of random programs."""

import random
from collections.abc import Iterable

import pytest
import torch

from skipkernels.executors.execution import Execution
from skipkernels.model.matrix import BLOCK_FORMATS
from skipkernels.program.state import LAYOUTS
from skipkernels.skipping.policy import (
    DensePolicy,
    FixedPolicy,
    NeuronPolicy,
    RandomPolicy,
    SkipPolicy,
    TimingPolicy,
)
from tests.executors.block_case import BlockCase
from tests.executors.programs import Case, compare_program
from tests.gpu.twin import GpuTwin

pytestmark = pytest.mark.gpu
POLICIES = [
    DensePolicy(),
    SkipPolicy(threshold=0.3, span=2, cold_start=0, cold_end=0, warmup_tokens=2),
    SkipPolicy(threshold=0.5, span=1, cold_start=0, cold_end=0, warmup_tokens=0, batch_rule="majority"),
    SkipPolicy(threshold=0.7, span=2, cold_start=0, cold_end=0, warmup_tokens=2, target_ratio=0.3),
    FixedPolicy((0, 2), warmup_tokens=2),
    RandomPolicy(0.5, seed=-3, cold_start=0, cold_end=0, warmup_tokens=2),
    TimingPolicy(0.25),
]
THRESHOLDS = (0.0, 0.2, 0.5, 1.5)
NEURON_POLICIES = [
    NeuronPolicy(gate_thresholds=THRESHOLDS, product_thresholds=(0.3,) * 4, warmup_tokens=2),
    NeuronPolicy(gate_thresholds=(0.3,) * 4, product_thresholds=THRESHOLDS, warmup_tokens=2, target_ratio=0.1),
    FixedPolicy((1, 3), gate_thresholds=THRESHOLDS, warmup_tokens=0),
]


def case(seed: int, dtype: torch.dtype, sequences: int | None = None) -> Case:
    """Sizes of every kind: odd ones, aligned ones, and some as wide as real models are; every third leaves out
    neurons."""
    draw = random.Random(seed)
    split = LAYOUTS["cuda"].kv_split_size
    longest = draw.choice([5, 40, split, 5 * split + 40])
    sequences = sequences or draw.randint(1, 16)
    wide, neurons = draw.random() < 0.5, seed % 3 == 2
    return Case(
        seq_lens=tuple(draw.randint(0, longest) for _ in range(sequences)),
        active=tuple(draw.random() < 0.8 for _ in range(sequences)),
        hidden_size=draw.choice([512, 1024, 2048]) if wide else draw.randint(1, 140),
        intermediate_size=draw.choice([1408, 2816, 5632]) if wide else draw.randint(1, 140),
        vocab_size=draw.choice([1000, 32000]) if wide else draw.randint(2, 300),
        head_dim=draw.choice([64, 128]) if wide else draw.choice([2, 6, 10, 64, 80, 96, 128]),
        num_key_value_heads=draw.randint(1, 3),
        group_size=draw.randint(1, 8),
        sliding_window=draw.choice([None, 1, 7, split, split + 50]),
        qk_norm=draw.random() < 0.5,
        qkv_bias=draw.random() < 0.5,
        o_proj_bias=draw.random() < 0.5,
        dtype=dtype,
        policies=(draw.choice(POLICIES), *(draw.sample(NEURON_POLICIES, 2) if neurons else ())),
        neuron_rows=neurons,
        seed=seed,
        layout=LAYOUTS["cuda"],
    )


def check(case: Case, kernels: str) -> None:
    execution = Execution(device="cuda", kernels=kernels).resolved()
    weights = case.weights()
    compare_program(case, lambda _, state: GpuTwin(case, weights, state, execution))


def parameters(cuda: Iterable[int], triton: Iterable[int], name: str) -> pytest.MarkDecorator:
    """(kernels, number): fewer for Triton, which compiles all its kernels for the sizes of each case."""
    values = [("cuda", number) for number in cuda] + [("triton", number) for number in triton]
    ids = [f"{kernels}-{name}{number}" for kernels, number in values]
    return pytest.mark.parametrize(("kernels", name), values, ids=ids, indirect=["kernels"])


@parameters(range(8), range(2), "seed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_every_buffer_agrees_after_every_instruction(kernels: str, seed: int, dtype: torch.dtype) -> None:
    check(case(seed, dtype), kernels)


FORMATS = tuple(BLOCK_FORMATS)


@parameters(range(len(FORMATS)), (0, 1, FORMATS.index("f8_e4m3")), "format")
def test_blocks_agree_in_every_format(kernels: str, format: int) -> None:
    lengths = tuple(5 + row % 3 for row in range(1 + 8 * (format % 2)))
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 1000}
    check(BlockCase.of(FORMATS[format], seq_lens=lengths, qk_norm=format % 3 == 0, num_layers=2, **sizes), kernels)


@parameters(range(1, 17), (1, 5, 16), "sequences")
def test_every_number_of_sequences_agrees(kernels: str, sequences: int) -> None:
    check(case(100 + sequences, torch.bfloat16, sequences), kernels)
