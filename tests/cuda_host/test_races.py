"""Kernels compiled for the race detector: what nothing orders is found under every schedule, harmful there or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda_host.api import Api
from tests.cuda_host.build import build_host_extension
from tests.cuda_host.controls import SEEDS, HostRuntime

KERNELS = Path(__file__).parent / "kernels"
SOURCES = [KERNELS / f"{name}.cu" for name in ("broken", "last_block", "copy", "reduce", "grid_barrier", "graph")]
THREADS = 96


@pytest.fixture(scope="module")
def library():
    return HostRuntime(build_host_extension(SOURCES, races=True))


@pytest.fixture(params=SEEDS)
def runtime(library, request):
    library.reset(seed=request.param)
    return library


def rotate(runtime, kernel):
    runtime.launch("launch_rotate", kernel, torch.zeros(THREADS), torch.zeros(THREADS), THREADS)


@pytest.mark.parametrize(
    ("kernel", "race"),
    [
        (
            b"no_barrier",
            r"(writes|reads) 4 bytes of shared memory at \d+ \(broken.cu:\d+\) that thread \(\d+,0,0\) of ",
        ),
        (b"warp_barrier_instead_of_block_barrier", "shared memory"),
        (b"no_warp_barrier", "shared memory"),
        (b"no_barrier_before_reuse", "shared memory"),
    ],
)
def test_missing_barriers(runtime, kernel, race):
    with pytest.raises(RuntimeError, match=rf"kernel {kernel.decode()},.*race: .*{race}.*nothing orders the two"):
        rotate(runtime, kernel)


@pytest.mark.parametrize("kernel", [b"correct", b"correct_by_warps"])
def test_barriers_order(runtime, kernel):
    rotate(runtime, kernel)


def test_kernels_without_races(runtime):
    x, counters = torch.ones(8 * 100), torch.zeros(1).int()
    runtime.launch("launch_sum_rows", x, 8, 100, 64, torch.zeros(8))
    runtime.launch("launch_sum_all", x, 8, 100, 64, torch.zeros(8), counters, torch.zeros(1))
    runtime.launch("launch_add_neighbours", torch.zeros(7, 40).int(), 7, 40, 3, counters, 1)
    runtime.launch("launch_reverse", 0, torch.zeros(3 * 8 * 64), torch.zeros(3 * 8 * 64), 3, 64)


def last_block_sum(runtime, way):
    x, partials, (arrivals, total) = torch.ones(7).int(), torch.zeros(7).int(), torch.zeros(2, 1).int()
    runtime.launch("launch_sum", way, x, 7, partials, arrivals, total)


@pytest.mark.parametrize("way", [0, 7], ids=["correct", "fences"])
def test_the_last_block_may_read_what_the_others_wrote(runtime, way):
    last_block_sum(runtime, way)


@pytest.mark.parametrize(
    "way",
    range(1, 7),
    ids=["last_by_number", "not_atomic", "partial_after_count", "no_fence", "fence_before_only", "fence_after_only"],
)
def test_it_may_not_without_an_atomic_that_orders(runtime, way):
    with pytest.raises(RuntimeError, match=r"race: .* of global memory .*last_block.cu"):
        last_block_sum(runtime, way)


def test_a_copy_writes_until_it_is_waited_for(runtime):
    with pytest.raises(RuntimeError, match=r"race: (reads|writes) 16 bytes of shared memory at \d+ \(copy.cu"):
        runtime.launch("launch_reverse", 3, torch.zeros(3 * 8 * 64), torch.zeros(3 * 8 * 64), 3, 64)


@pytest.mark.parametrize("mistake", [0, 2, 3], ids=["correct", "reads_before_wait", "writes_before_wait"])
def test_overlapping_kernels(runtime, mistake):
    api, x, y = Api(runtime), torch.zeros(192).int(), torch.zeros(192).int()
    stream = api.stream()
    api.begin_capture(stream)
    for wrong, arguments in [(0, (x, y)), (mistake, (y, x)), (0, (x, y))]:
        api.launch_link(stream, wrong, *arguments, 3, 64)
    error = api.launch_graph(api.end_capture(stream), stream)
    assert error == ("cudaErrorLaunchFailure" if mistake else "cudaSuccess")
    assert mistake == 0 or "kernel link" in runtime.failure


@pytest.mark.parametrize("carelessness", [0, 1, 2], ids=["careful", "triggers_early", "reads_from_cache"])
def test_reading_before_the_wait_what_was_written_two_kernels_before(runtime, carelessness):
    api, zeros, (a, b, c, d) = Api(runtime), torch.zeros(192).int(), torch.ones(4, 192).int()
    stream = api.stream()
    api.begin_capture(stream)
    for from_, earlier, to in [(a, zeros, b), (b, zeros, c), (c, b, d)]:
        assert api.launch_add_earlier(stream, carelessness, from_, earlier, to, 3, 64) == "cudaSuccess"
    error = api.launch_graph(api.end_capture(stream), stream)
    assert error == ("cudaErrorLaunchFailure" if carelessness else "cudaSuccess")
    assert carelessness or d.unique().tolist() == [2]
