"""Correct kernels give correct results under every schedule."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.cuda_host.build import build_host_extension
from tests.cuda_host.controls import SEEDS, HostRuntime

KERNELS = Path(__file__).parent / "kernels"


@pytest.fixture(scope="module")
def runtime():
    return HostRuntime(build_host_extension([KERNELS / "reduce.cu"]))


def p(t):
    import ctypes

    return ctypes.c_void_p(t.data_ptr())


@pytest.mark.parametrize("seed", SEEDS)
def test_row_sums(runtime, seed):
    runtime.reset(seed=seed)
    x = torch.randint(-8, 8, (5, 777)).float()
    sums = torch.full((5,), float("nan"))
    error = runtime.library.launch_sum_rows(p(x), 5, 777, 256, p(sums))
    assert error == 0, runtime.failure
    assert torch.equal(sums, x.sum(1))
