"""Correct kernels give correct results under every schedule."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch

from tests.cuda_host.build import build_host_extension
from tests.cuda_host.controls import SEEDS, HostRuntime

KERNELS = Path(__file__).parent / "kernels"
NAN = float("nan")
SOURCES = [KERNELS / f"{name}.cu" for name in ("reduce", "grid_barrier", "mma", "numbers", "schedule")]


@pytest.fixture(scope="module")
def library():
    return HostRuntime(build_host_extension(SOURCES))


@pytest.fixture(params=SEEDS)
def runtime(library, request):
    library.reset(seed=request.param)
    return library


@pytest.fixture
def ascending(library):
    library.reset()
    return library


def small_integers(*shape):
    """Floats whose sums are exact in any order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("threads", [32, 256])
def test_row_sums_by_shuffles_and_shared_memory(runtime, threads):
    x, sums = small_integers(5, 777), torch.full((5,), NAN)
    runtime.launch("launch_sum_rows", x, 5, 777, threads, sums)
    assert torch.equal(sums, x.sum(1))


def test_last_block_merges(runtime):
    x, total, arrivals = small_integers(9, 100), torch.full((1,), NAN), torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        total.fill_(NAN)
        runtime.launch("launch_sum_all", x, 9, 100, 64, torch.full((9,), NAN), arrivals, total)
        assert total.item() == x.sum()


def test_grid_barrier(runtime):
    x = torch.arange(7 * 40, dtype=torch.int32).reshape(7, 40)
    expected = x.clone()
    for _ in range(4):
        expected = expected + expected.roll(-1, 0)
    runtime.launch("launch_add_neighbours", x, 7, 40, 4, torch.zeros(1, dtype=torch.int32), 1)
    assert torch.equal(x, expected)


def test_grid_barrier_needs_all_blocks_resident(ascending):
    x, counter = torch.zeros(7, 40, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"add_neighbours.*no thread can go on\n.*block \(0,0,0\)"):
        ascending.launch("launch_add_neighbours", x, 7, 40, 1, counter, 0)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("tf32", torch.float32)])
def test_mma_is_a_matrix_product(runtime, name, dtype):
    a, b, d = small_integers(32, 48).to(dtype), small_integers(24, 48).to(dtype), small_integers(32, 24)
    expected = d + a.float() @ b.float().T
    runtime.launch(f"launch_multiply_{name}", a, b, d, 32, 24, 48)
    assert torch.equal(d, expected)


def test_tf32_ignores_the_lower_13_bits(ascending):
    a, b, d = torch.zeros(16, 8), torch.zeros(8, 8), torch.zeros(16, 8)
    a[3, 5], b[6, 5] = 1 + 2**-10 + 2**-11, 1
    ascending.launch("launch_multiply_tf32", a, b, d, 16, 8, 8)
    assert d[3, 6] == 1 + 2**-10


def all_patterns(dtype):
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_is_exact_for_every_pattern(ascending, dtype):
    x, y = all_patterns(dtype), torch.empty(2**16)
    ascending.launch("launch_widen", dtype == torch.bfloat16, x, y, 2**16)
    assert_same_bits(y, x.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_as_torch_does(ascending, dtype):
    exact = all_patterns(dtype).float()
    exact = exact[exact.isfinite()].sort().values
    halfway = (exact[1:] + exact[:-1]) / 2
    beside = [torch.nextafter(halfway, torch.tensor(sign * torch.inf)) for sign in (-1, 1)]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, NAN, 65519.0, 65520.0, 3.4e38, 1e-45, 2**-25, 2**-24])
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(1))
    x = torch.cat([exact, halfway, *beside, special, bits.to(torch.int32).view(torch.float32)])
    y = torch.empty(len(x), dtype=dtype)
    ascending.launch("launch_narrow", dtype == torch.bfloat16, x, y, len(x))
    assert_same_bits(y, x.to(dtype))


def assert_same_bits(actual, expected):
    """Equal, -0 unlike 0, any NaN like any other."""
    assert torch.equal(actual.isnan(), expected.isnan())
    same = torch.nan_to_num(actual, nan=1.0) == torch.nan_to_num(expected, nan=1.0)
    assert (same & (actual.signbit() == expected.signbit()) | expected.isnan()).all()


FULL, LOW, ODD = 0xFFFFFFFF, 0x0000FFFF, 0xAAAAAAAA
VALUES = torch.arange(32, dtype=torch.int32) * 3 - 40


@pytest.mark.parametrize("lanes", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles_take_from_the_right_lane(runtime, lanes, width):
    lane = torch.arange(32)
    segment = lane // width * width
    expected = {
        0: segment + lanes % width,
        1: torch.where((lane ^ lanes) < segment + width, lane ^ lanes, lane),
        2: torch.where(lane + lanes < segment + width, lane + lanes, lane),
        3: torch.where(lane - lanes >= segment, lane - lanes, lane),
    }
    for kind, source in expected.items():
        y = torch.empty(32, dtype=torch.int32)
        runtime.launch("launch_exchange", kind, FULL, lanes, width, VALUES, y)
        assert torch.equal(y, VALUES[source]), f"kind {kind}"


@pytest.mark.parametrize("mask", [FULL, LOW, ODD])
def test_votes_count_the_lanes_of_the_mask(runtime, mask):
    x = (torch.arange(32) % 3 == 0).int()
    inside = [lane for lane in range(32) if mask >> lane & 1]
    expected = {4: sum(1 << lane for lane in inside if x[lane]), 5: 1, 6: 0}
    for kind, result in expected.items():
        y = torch.full((32,), -7, dtype=torch.int32)
        runtime.launch("launch_exchange", kind, mask, 0, 32, x, y)
        assert [value & FULL for value in y.tolist() if value != -7] == [result] * len(inside)


def test_every_thread_knows_where_it_is(runtime):
    out = torch.full((2 * 3 * 2 * 5 * 2 * 4, 12), -1, dtype=torch.int32)
    runtime.launch("launch_describe_thread", out)
    places = [
        (*t[::-1], *b[::-1])
        for b in product(range(2), range(3), range(2))
        for t in product(range(4), range(2), range(5))
    ]
    expected = torch.tensor([(*place, 5, 2, 4, 2, 3, 2) for place in places], dtype=torch.int32)
    assert torch.equal(out, expected)


def test_the_seed_decides_the_order_of_blocks_and_threads(library):
    orders = []
    for seed in SEEDS:
        library.reset(seed=seed)
        order = torch.full((4 * 40,), -1, dtype=torch.int32)
        library.launch("launch_record_order", torch.zeros(1, dtype=torch.int32), order, 4, 40)
        orders.append(order.tolist())
    everyone = list(range(160))
    assert (orders[0], orders[1]) == (everyone, everyone[::-1])
    assert all(sorted(order) == everyone for order in orders[2:])
    assert len({tuple(order) for order in orders}) == len(orders)


def test_shared_memory_starts_as_nan_in_every_block(runtime):
    out = torch.zeros(128)
    runtime.launch("launch_read_fresh_shared_memory", out)
    assert out.isnan().all()
