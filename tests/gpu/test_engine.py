"""The engine on a GPU: against transformers, against the reference, against itself, and for a long time."""

import gc

import pytest
import torch

from skipkernels import Engine, SamplingParams, SkipPolicy
from skipkernels.errors import DeviceError, RequestError
from skipkernels.skipping.policy import NeuronPolicy, Policy
from tests.models import FAMILIES, random_prompt, stock_tokens, tiny_engine, tiny_module

pytestmark = pytest.mark.gpu
SKIPPING = SkipPolicy(threshold=0.6, span=1, cold_start=0, cold_end=1, warmup_tokens=3)
SLACK_BYTES = 8 << 20
"""By which free memory may change while nothing leaks: the driver hands it out in pieces of 2 MB, when it likes."""
HELD = SkipPolicy(threshold=0.6, span=1, cold_start=0, cold_end=0, warmup_tokens=3, target_ratio=0.2)
NEURONS = NeuronPolicy(gate_thresholds=(5e-3,) * 4, product_thresholds=(1e-3,) * 4, warmup_tokens=3)
PROMPTS = [random_prompt(9, 1), random_prompt(4, 2), random_prompt(17, 3)]


def gpu_engine(**options) -> Engine:
    module = options.pop("module", None) or tiny_module(options.pop("family", "llama"))
    return Engine.from_pretrained(module.cuda(), device="cuda", **{"max_seq_len": 96, **options})


FEW_FAMILIES = ("llama", "mistral with a sliding window", "qwen3", "qwen3_moe", "olmo2", "gemma2")
"""For Triton, which compiles all its kernels for the sizes of each."""
CASES = [("cuda", family) for family in FAMILIES] + [("triton", family) for family in FEW_FAMILIES]


@pytest.mark.parametrize(("kernels", "family"), CASES, indirect=["kernels"])
def test_dense_tokens_are_those_of_transformers(family: str, kernels: str) -> None:
    module, prompt = tiny_module(family), random_prompt(11)
    expected = stock_tokens(module, prompt, 24)
    engine = gpu_engine(module=module, kernels=kernels)
    assert engine.generate([prompt], max_new_tokens=24)[0].token_ids == expected


@pytest.mark.parametrize("policy", [SKIPPING, HELD, NEURONS], ids=lambda policy: policy.label)
def test_skipping_is_that_of_the_reference(policy: Policy, kernels: str, conditional: str, loop: str) -> None:
    options = {"max_batch_size": 3, "policy": policy}
    sampling = [SamplingParams(), SamplingParams(temperature=0.8, seed=5), SamplingParams(top_k=20, temperature=1.0)]
    expected = tiny_engine(executor="reference", **options).generate(PROMPTS, max_new_tokens=20, sampling=sampling)
    engine = gpu_engine(kernels=kernels, conditional=conditional, loop=loop, **options)
    actual = engine.generate(PROMPTS, max_new_tokens=20, sampling=sampling)
    for ours, reference in zip(actual, expected, strict=True):
        assert ours.token_ids == reference.token_ids
        assert ours.skip_map.tolist() == reference.skip_map.tolist()
        assert ours.unread_map.tolist() == reference.unread_map.tolist()
    assert any(answer.unread_ratio > 0 for answer in expected)


def test_a_hundred_runs_are_one(kernels: str) -> None:
    engine = gpu_engine(module=tiny_module(dtype=torch.bfloat16), kernels=kernels, max_batch_size=3, policy=SKIPPING)
    first = engine.generate(PROMPTS, max_new_tokens=16)
    logits = engine.state.logits.clone()
    for _ in range(100):
        again = engine.generate(PROMPTS, max_new_tokens=16)
        assert [answer.token_ids for answer in again] == [answer.token_ids for answer in first]
        assert torch.equal(engine.state.logits, logits)


def test_streamed_tokens_are_those_of_one_call(kernels: str, loop: str) -> None:
    engine = gpu_engine(kernels=kernels, loop=loop, policy=SKIPPING)
    (expected,) = engine.generate(PROMPTS[:1], max_new_tokens=20)
    chunks = list(engine.stream(PROMPTS[0], max_new_tokens=20))
    assert [chunk.token_id for chunk in chunks[:-1]] == expected.token_ids
    assert chunks[-1].generation.token_ids == expected.token_ids


def test_an_abandoned_stream_leaves_the_engine_usable(kernels: str, loop: str) -> None:
    engine = gpu_engine(kernels=kernels, loop=loop)
    (expected,) = engine.generate(PROMPTS[:1], max_new_tokens=20)
    stream = engine.stream(PROMPTS[1], max_new_tokens=60)
    next(stream)
    assert engine.generate(PROMPTS[:1], max_new_tokens=20)[0].token_ids == expected.token_ids


def test_ten_thousand_steps_leave_nothing_behind(kernels: str) -> None:
    engine = gpu_engine(kernels=kernels, max_seq_len=500, policy=SKIPPING)
    engine.generate(PROMPTS[:1], max_new_tokens=480)
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    for _ in range(10_000 // 480 + 1):  # a leak of a kilobyte a step would be 10 MB
        engine.generate(PROMPTS[:1], max_new_tokens=480)
    assert before - torch.cuda.mem_get_info()[0] < SLACK_BYTES


def test_executors_give_their_memory_back(kernels: str) -> None:
    """Twelve caches of 4 MB each: one that is kept does not show, all of them do."""
    module = tiny_module().cuda()
    free = []
    for round_ in range(14):
        policy = SkipPolicy(0.5 + 0.03 * round_, warmup_tokens=0)
        engine = gpu_engine(module=module, kernels=kernels, policy=policy, max_seq_len=512, max_batch_size=16)
        assert engine.state.cache_bytes() > 4 << 20
        engine.generate(PROMPTS[:1], max_new_tokens=8)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[1] - free[-1] < SLACK_BYTES  # the first one loads modules


def test_several_engines_share_a_device_and_a_users_stream(kernels: str) -> None:
    one, two = gpu_engine(kernels=kernels), gpu_engine(kernels=kernels, policy=SKIPPING)
    expected = [engine.generate(PROMPTS[:1], max_new_tokens=16)[0].token_ids for engine in (one, two)]
    with torch.cuda.stream(torch.cuda.Stream()):
        actual = [engine.generate(PROMPTS[:1], max_new_tokens=16)[0].token_ids for engine in (one, two)]
    assert actual == expected


def test_an_engine_is_not_loaded_inside_somebodys_capture(kernels: str) -> None:
    module = tiny_module().cuda()
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(DeviceError, match="being captured into a graph"):
        gpu_engine(module=module, kernels=kernels)
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == before
    engine = gpu_engine(module=module, kernels=kernels)
    assert len(engine.generate(PROMPTS[:1], max_new_tokens=4)[0].token_ids) == 4


def test_a_prompt_beyond_the_cache_is_refused(kernels: str) -> None:
    with pytest.raises(RequestError, match="max_seq_len=96"):
        gpu_engine(kernels=kernels).generate([random_prompt(97)], max_new_tokens=1)
