"""The kernels compile for GPUs that are not here, with the launches a decode would make: registers, memory, code."""

import re
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from skipkernels.model.config import resolve_dtype
from skipkernels.skipping.policy import Policy, RandomPolicy, SkipPolicy
from tests.kernels.triton.compiling import Compiled, compile_launch, launches

POLICY = SkipPolicy(threshold=0.9, span=2, cold_start=0, cold_end=0, warmup_tokens=4)
HOLDING = SkipPolicy(threshold=0.9, span=2, cold_start=0, cold_end=0, warmup_tokens=4, target_ratio=0.25)
TOGETHER = SkipPolicy(threshold=0.9, span=2, cold_start=0, cold_end=0, warmup_tokens=4, batch_rule="majority")
RANDOM = RandomPolicy(0.25, seed=-(2**40), cold_start=0, cold_end=0, warmup_tokens=4)
SHARED_BYTES = 99 * 1024
"""The most a program may have on every GPU from compute capability 8.0 on."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was compiled before must not stand in for what is compiled now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_all(
    capability: int, shapes: str, dtype: torch.dtype, batch_size: int, policy: Policy, **changes: object
) -> dict[str, Compiled]:
    kernels = {}
    for launch in launches(shapes, dtype, batch_size, policy, **changes):
        kernel = compile_launch(launch, capability)
        print(
            f"sm_{capability} {shapes} {dtype} batch {batch_size} {kernel.name}: {kernel.registers} registers, "
            f"{kernel.stack_bytes} bytes of stack, {kernel.shared_bytes} of shared memory"
        )
        assert kernel.stack_bytes == 0, f"{kernel.name} spills {kernel.stack_bytes} bytes a thread"
        assert kernel.shared_bytes <= SHARED_BYTES, f"{kernel.name} takes {kernel.shared_bytes} bytes"
        kernels[kernel.name] = kernel
    return kernels


@pytest.fixture(scope="module")
def kernels() -> dict[str, Compiled]:
    return compile_all(90, "llama-3-8b", torch.bfloat16, 1, HOLDING)


def test_nothing_spills(kernels: dict[str, Compiled]) -> None:
    assert len(kernels) == 11
    assert all(kernel.registers < 200 for kernel in kernels.values())


@pytest.mark.parametrize(
    "name", ["qkv_rope_append", "attend_split", "o_proj_add", "gate_up_silu", "down_proj_add", "lm_head"]
)
def test_weights_and_caches_are_read_16_bytes_at_a_time(kernels: dict[str, Compiled], name: str) -> None:
    ptx = kernels[f"{name}_kernel"].ptx
    assert re.search(r"cp\.async\.cg\.shared\.global.* 0x10|ld\.global\.v4\.b32", ptx)
    assert not re.search(r"ld\.global\S*b16", ptx)


@pytest.mark.parametrize("name", ["skip_gate_kernel", "sample_kernel"])
def test_arithmetic_that_must_give_the_references_bits_rounds_every_operation(
    kernels: dict[str, Compiled], name: str
) -> None:
    """ptxas contracts nothing either: it is told so by the option that keeps Triton from it."""
    kernel = kernels[name]
    assert kernel.options["enable_fp_fusion"] is False
    assert "div.rn.f32" in kernel.ptx
    assert not re.search(r"(fma\.rn|div\.full|\w+\.approx)(\.ftz)?\.f32", kernel.ptx)


def test_progress_is_released_behind_all_other_writes(kernels: dict[str, Compiled]) -> None:
    before, _, after = kernels["advance_kernel"].ptx.partition("atom.global.sys.release.exch.b64")
    assert after
    assert "bar.sync" in before.rpartition("st.global")[2]
    assert "st.global" not in after


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("shapes", "dtype"),
    [
        ("llama-3.2-1b", "bf16"),
        ("llama-3.2-1b", "fp16"),
        ("llama-3.2-1b", "fp32"),
        ("llama-2-7b", "bf16"),
        ("llama-3-8b", "bf16"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_nothing_spills_anywhere(capability: int, shapes: str, dtype: str, batch_size: int) -> None:
    compile_all(capability, shapes, resolve_dtype(dtype), batch_size, POLICY)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("policy", [HOLDING, TOGETHER, RANDOM], ids=lambda policy: policy.label)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_nothing_spills_with_biases_and_norms_of_heads(capability: int, policy: Policy, batch_size: int) -> None:
    """The other variants of the kernels: Qwen's biases and norms, and every kind of gate."""
    compile_all(
        capability, "llama-3-8b", torch.bfloat16, batch_size, policy, qkv_bias=True, o_proj_bias=True, qk_norm=True
    )
