"""The kernels compile for GPUs that are not here, with the launches a decode would make: registers, memory, code."""

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from skipkernels.model.config import resolve_dtype
from skipkernels.program.state import LAYOUTS
from tests.kernels.triton.compiling import Compiled, compile_launch, launches

EXPERT_KERNELS = (
    "router_kernel",
    "choose_experts_kernel",
    "experts_gate_up_act_kernel",
    "experts_down_proj_add_kernel",
)
EXPERT_NEURON_KERNELS = ("experts_gate_up_act_kernel", "experts_down_proj_neurons_add_kernel")
EXPERTS = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "expert_layers": (True, True),
}
MULTI_AXIS = (("rope_type", "default"), ("rope_theta", 10000.0), ("mrope_section", (16, 24, 24)))
SHARED_BYTES = 99 * 1024
"""The most a program may have on every GPU from compute capability 8.0 on."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was compiled before must not stand in for what is compiled now."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compile_all(
    capability: int,
    shapes: str,
    dtype: torch.dtype,
    rows: tuple[int, int],
    *,
    gated: bool = True,
    neurons: bool = False,
    only: Collection[str] = (),
    **changes: object,
) -> dict[str, Compiled]:
    kernels = {}
    for launch in launches(shapes, dtype, *rows, gated=gated, neurons=neurons, **changes):
        if only and launch.kernel.__name__ not in only:
            continue
        kernel = compile_launch(launch, capability)
        print(
            f"sm_{capability} {shapes} {dtype} rows {rows} {kernel.name}: {kernel.registers} registers, "
            f"{kernel.stack_bytes} bytes of stack, {kernel.shared_bytes} of shared memory"
        )
        assert kernel.stack_bytes == 0, f"{kernel.name} spills {kernel.stack_bytes} bytes a thread"
        assert kernel.shared_bytes <= SHARED_BYTES, f"{kernel.name} takes {kernel.shared_bytes} bytes"
        kernels[kernel.name] = kernel
    return kernels


@pytest.fixture(scope="module")
def kernels() -> dict[str, Compiled]:
    return compile_all(90, "llama-3-8b", torch.bfloat16, (1, 0))


NEURON_KERNELS = {
    f"{op}_kernel" for op in ("neuron_gate", "gate_proj_act", "select_neurons", "up_proj_mul", "down_proj_neurons_add")
}


@pytest.fixture(scope="module")
def neuron_kernels() -> dict[str, Compiled]:
    """Those that only a program which leaves neurons out has."""
    compiled = compile_all(90, "llama-3-8b", torch.bfloat16, (1, 0), only=NEURON_KERNELS, neurons=True)
    assert set(compiled) == NEURON_KERNELS
    return compiled


def test_nothing_spills(kernels: dict[str, Compiled], neuron_kernels: dict[str, Compiled]) -> None:
    assert len(kernels) == 12
    assert all(kernel.registers < 200 for kernel in (kernels | neuron_kernels).values())


@pytest.mark.parametrize(
    "name",
    [
        "qkv_rope_append",
        "attend_split",
        "o_proj_add",
        "gate_up_act",
        "down_proj_add",
        "gate_proj_act",
        "up_proj_mul",
        "down_proj_neurons_add",
        "lm_head",
    ],
)
def test_weights_and_caches_are_read_16_bytes_at_a_time(
    kernels: dict[str, Compiled], neuron_kernels: dict[str, Compiled], name: str
) -> None:
    ptx = (kernels | neuron_kernels)[f"{name}_kernel"].ptx
    assert re.search(r"cp\.async\.cg\.shared\.global.* 0x10|ld\.global\.v4\.b32", ptx)
    assert not re.search(r"ld\.global\S*b16", ptx)


@pytest.mark.parametrize("name", ["skip_gate_kernel", "neuron_gate_kernel", "sample_kernel"])
def test_arithmetic_that_must_give_the_references_bits_rounds_every_operation(
    kernels: dict[str, Compiled], neuron_kernels: dict[str, Compiled], name: str
) -> None:
    """ptxas contracts nothing either: it is told so by the option that keeps Triton from it."""
    kernel = (kernels | neuron_kernels)[name]
    assert kernel.options["enable_fp_fusion"] is False
    assert "div.rn.f32" in kernel.ptx
    assert not re.search(r"(fma\.rn|div\.full|\w+\.approx)(\.ftz)?\.f32", kernel.ptx)


def test_progress_is_one_plain_store_behind_a_fence_for_all_others(kernels: dict[str, Compiled]) -> None:
    """Atomics need not be atomic for the host, across its bus; a fence covers what other threads wrote only once they
    have met at a barrier."""
    ptx = kernels["advance_kernel"].ptx
    before, _, after = ptx.partition("fence.acq_rel.sys")
    assert "bar.sync" in before.rpartition("st.global")[2]
    behind = after.partition("$L__BB")[0]  # the prompt row's branch comes next
    assert re.findall(r"st\.global\S*", behind) == ["st.global.b64"]
    assert "atom" not in ptx


def test_attention_is_one_code_for_blocks_of_every_size() -> None:
    """Its sums have the same order, and a row the same bits, by construction."""
    codes = []
    for block_size in (16, 24, 32):
        layout = replace(LAYOUTS["cuda"], block_size=block_size)
        chosen = launches("llama-3.2-1b", torch.bfloat16, 1, 0, gated=False, layout=layout)
        codes += [
            compile_launch(launch, 90).ptx for launch in chosen if launch.kernel.__name__ == "attend_split_kernel"
        ]
    assert codes[0] == codes[1] == codes[2]


@pytest.mark.parametrize(("rows", "qk_norm"), [((16, 16), True), ((64, 0), False)])
def test_many_rows_spill_nothing(rows: tuple[int, int], *, qk_norm: bool) -> None:
    compile_all(90, "llama-3-8b", torch.bfloat16, rows, qk_norm=qk_norm, rope_parameters=MULTI_AXIS)
    compile_all(90, "llama-3-8b", torch.bfloat16, rows, neurons=True, only=NEURON_KERNELS)


BLOCK_KERNELS = {
    f"{op}_kernel" for op in ("embed", "qkv_rope_append", "o_proj_add", "gate_up_act", "down_proj_add", "lm_head")
}
"""Those that read matrices of blocks, in steps that leave no neurons out."""
FORMATS = [("q4_0", "q4_0"), ("q8_0", "q8_0"), ("q4_1", "q5_1"), ("q5_0", "q5_0"), ("q4_k", "q6_k"), ("q6_k", "q5_k")]
FORMATS += [("f8_e4m3", "f8_e4m3")]


@pytest.mark.parametrize(
    ("formats", "rows"), [(("q4_0", "q4_0"), (1, 0)), (("q4_k", "q6_k"), (16, 0)), (("f8_e4m3", "f8_e4m3"), (1, 0))]
)
def test_blocks_spill_nothing_and_are_read_in_wide_pieces(formats: tuple[str, str], rows: tuple[int, int]) -> None:
    """16 bytes a thread. With several rows of activations 8 where a tile has 16 rows of a matrix: these are 64 bytes of
    each row all the same, and tiles twice as wide take 255 registers and spill (sm_90, q6_k)."""
    kernels = compile_all(90, "llama-3-8b", torch.bfloat16, rows, only=BLOCK_KERNELS, formats=formats)
    assert set(kernels) == BLOCK_KERNELS
    for name, kernel in kernels.items():
        wide = "0x10" if rows[0] == 1 else "0x(10|8)"
        assert re.search(rf"cp\.async\S*shared\.global.* {wide}\b|ld\.global\S*v4\.b32", kernel.ptx), name
        assert not re.search(r"ld\.global\S*b(8|16)", kernel.ptx), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("rows", [(1, 0), (2, 0), (16, 0)])
def test_blocks_spill_nothing_anywhere(capability: int, formats: tuple[str, str], rows: tuple[int, int]) -> None:
    for shapes in ("llama-3.2-1b", "llama-3-8b"):
        compile_all(capability, shapes, torch.bfloat16, rows, only=BLOCK_KERNELS, formats=formats)


@pytest.mark.parametrize(
    ("only", "variant"),
    [
        (
            ("norm_rope_append_kernel", "gate_up_act_kernel"),
            {"qk_norm": True, "norms_whole_qk": True, "input_norms": False, "branch_norms": True},
        ),
        (("qkv_rope_append_kernel",), {"partial_rotary_factor": 0.75, "query_scale_beta": 0.1}),
        (("attend_split_kernel", "lm_head_kernel"), {"attention_softcap": 50.0, "logits_softcap": 30.0}),
        (("merge_splits_kernel",), {"attention_sinks": True}),
        (EXPERT_KERNELS, {**EXPERTS, "activation": "clamped_swiglu", "expert_biases": True}),
        (EXPERT_NEURON_KERNELS, {**EXPERTS, "neurons": True}),
        (EXPERT_NEURON_KERNELS, {**EXPERTS, "neurons": True, "activation": "clamped_swiglu", "expert_biases": True}),
    ],
)
def test_what_single_families_need_spills_nothing(only: tuple[str, ...], variant: dict[str, Any]) -> None:
    assert set(compile_all(90, "llama-3-8b", torch.bfloat16, (1, 0), only=only, **variant)) == set(only)


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
@pytest.mark.parametrize("rows", [(1, 0), (2, 0), (16, 0), (4, 60), (64, 0)])
def test_nothing_spills_anywhere(capability: int, shapes: str, dtype: str, rows: tuple[int, int]) -> None:
    compile_all(capability, shapes, resolve_dtype(dtype), rows)
    compile_all(capability, shapes, resolve_dtype(dtype), rows, neurons=True, only=NEURON_KERNELS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [(1, 0), (4, 0), (4, 60)])
def test_nothing_spills_with_biases_norms_of_heads_and_axes(
    capability: int, rows: tuple[int, int], *, gated: bool
) -> None:
    """The other variants of the kernels: Qwen's biases and norms, three positions, the dense program."""
    variants = {"qkv_bias": True, "o_proj_bias": True, "qk_norm": True, "rope_parameters": MULTI_AXIS}
    compile_all(capability, "llama-3-8b", torch.bfloat16, rows, gated=gated, **variants)
