"""Every mistake in kernels/broken.cu and kernels/last_block.cu is found, and said to be what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda_host.build import build_host_extension, run_under_asan
from tests.cuda_host.controls import SEEDS, HostRuntime

KERNELS = Path(__file__).parent / "kernels"
SOURCES = [KERNELS / f"{name}.cu" for name in ("broken", "last_block", "prefetch", "copy")]
THREADS = 96


@pytest.fixture(scope="module")
def runtime():
    return HostRuntime(build_host_extension(SOURCES))


def rotate(runtime, kernel, seed=0):
    runtime.reset(seed=seed)
    x, y = torch.arange(THREADS + 1).float(), torch.full((THREADS,), float("nan"))
    runtime.launch("launch_rotate", kernel.encode(), x[:THREADS], y, THREADS)
    return torch.equal(y, x[:THREADS].roll(-1))


@pytest.mark.parametrize("kernel", ["correct", "correct_by_warps"])
def test_correct_kernels_pass_under_every_seed(runtime, kernel):
    assert all(rotate(runtime, kernel, seed) for seed in range(50))


@pytest.mark.parametrize(
    "kernel",
    ["no_barrier", "warp_barrier_instead_of_block_barrier", "no_warp_barrier", "no_barrier_before_reuse"],
)
def test_a_missing_barrier_shows_as_a_wrong_result(runtime, kernel):
    right = [rotate(runtime, kernel, seed) for seed in SEEDS]
    assert right.count(False) >= 2, f"right under seeds {right}"


@pytest.mark.parametrize(
    ("kernel", "message"),
    {
        "barrier_in_a_branch": r"95 of 96 threads wait at __syncthreads \(broken.cu:\d+\).*"
        r"\n    1 of 96 threads exited: \(13,0,0\)",
        "two_barriers_that_are_not_one": r"arrives at __syncthreads \(broken.cu:\d+\), while thread \(0,0,0\) waits at",
        "return_before_barrier": r"95 of 96 threads wait at __syncthreads.*\n.*1 of 96 threads exited: \(95,0,0\)",
        "shuffle_of_half_a_warp": r"16 of 96 threads wait at __shfl_down_sync \(broken.cu:\d+\) in warp 0 "
        r"with mask 0xffffffff: \(0,0,0\) to \(15,0,0\)",
        "shuffle_after_exit": r"31 of 96 threads wait at __shfl_down_sync .* in warp 2 .*to \(94,0,0\)",
        "shuffle_from_outside_the_mask": r"__shfl_down_sync \(broken.cu:\d+\): lane 15 reads lane 16",
        "shuffle_without_itself": r"thread \(16,0,0\): is not in its own mask at __shfl_xor_sync",
        "two_masks": r"16 of 96 threads wait at __shfl_down_sync .* with mask 0xffffffff: \(0,0,0\) to \(15,0,0\)",
        "waits_for_nobody": r"96 of 96 threads poll: \(0,0,0\) to \(95,0,0\)",
        "writes_behind_shared_memory": r"wrote past the end of its 384 bytes of shared memory",
        "misaligned_copy": r"thread \(1,0,0\): copy_async: 0x\w+ is not aligned to 16 bytes",
        "needs_a_large_stack": r"thread \(0,0,0\): needs more than the 262144 bytes of its stack",
    }.items(),
)
def test_what_cannot_work_fails_the_launch(runtime, kernel, message):
    with pytest.raises(RuntimeError, match=rf"kernel {kernel}\b(?s:.*){message}"):
        rotate(runtime, kernel)
    assert runtime.call("launch_rotate", b"correct", torch.zeros(32), torch.zeros(32), 32), "the error is sticky"


def last_block_sum(runtime, mistake, seed):
    runtime.reset(seed=seed)
    x = torch.arange(1, 8, dtype=torch.int32)
    partials, arrivals, total = torch.full((7,), 10**6, dtype=torch.int32), *torch.zeros(2, 1, dtype=torch.int32)
    runtime.launch("launch_sum", mistake, x, 7, partials, arrivals, total)
    return total.item() == x.sum()


@pytest.mark.parametrize("mistake", [1, 3], ids=["last_by_number", "partial_after_count"])
def test_a_wrong_last_block_shows_as_a_wrong_result(runtime, mistake):
    assert all(last_block_sum(runtime, 0, seed) for seed in SEEDS)
    assert not all(last_block_sum(runtime, mistake, seed) for seed in SEEDS)


def reverse(runtime, mistake, seed):
    runtime.reset(seed=seed)
    x, y = torch.arange(2 * 3 * 8 * 32).float(), torch.empty(2 * 3 * 8 * 32)
    runtime.launch("launch_reverse", mistake, x, y, 3, 64)
    return torch.equal(y, x.reshape(3, -1).flip(1).reshape(-1))


@pytest.mark.parametrize("mistake", [1, 2, 3], ids=["no_wait", "waits_for_first_only", "no_barrier"])
def test_a_copy_not_waited_for_shows_as_a_wrong_result(runtime, mistake):
    assert all(reverse(runtime, 0, seed) for seed in SEEDS)
    assert not all(reverse(runtime, mistake, seed) for seed in SEEDS)


@pytest.mark.parametrize(("offset", "size", "error"), [(8, 32, "is not aligned"), (0, 24, "size 24 is not a multiple")])
def test_prefetch_wants_multiples_of_sixteen(runtime, offset, size, error):
    runtime.reset()
    with pytest.raises(RuntimeError, match=rf"prefetch_l2: .*{error}"):
        runtime.launch("launch_prefetch", torch.zeros(64, dtype=torch.uint8)[offset:], size)


UNDER_ASAN = """
import ctypes, sys
from tests.cuda_host.controls import HostRuntime
library, function, argument = sys.argv[1:]
x, y = (ctypes.c_float * 96)(), (ctypes.c_float * 96)()
runtime = HostRuntime(library)
if function == "launch_rotate":
    runtime.launch(function, argument.encode(), x, y, 96)
else:
    runtime.launch(function, x, int(argument))
"""


@pytest.mark.parametrize(
    ("function", "argument", "error"),
    [
        ("launch_rotate", "correct", None),
        ("launch_prefetch", "384", None),
        ("launch_rotate", "reads_behind_global_memory", "memory, block (0,0,0), thread (95,0,0)"),
        ("launch_rotate", "writes_behind_shared_memory", "memory, block (0,0,0), thread (95,0,0)"),
        ("launch_prefetch", "400", "prefetch_l2"),
    ],
)
def test_address_sanitizer_sees_accesses_out_of_bounds(function, argument, error):
    library = build_host_extension(SOURCES, sanitize=True)
    result = run_under_asan("-c", UNDER_ASAN, str(library), function, argument)
    if error is None:
        assert result.returncode == 0, result.stderr
    else:
        assert "heap-buffer-overflow" in result.stderr, result.stderr
        assert error in result.stderr
