"""Tests on a real GPU: ``pytest -m gpu``, skipped where there is none. They need no package beyond pytest.

``-k cuda`` is made to end within four minutes on 16 cores, by this account (estimates, for none of it has run on a
GPU): 48 random programs, each of 27 instructions between two copies of 35 buffers, a second and a half each; 34 cases
of the engine, most of them a model of four layers and some dozens of steps, a second each, beside 10,000 steps and 14
engines. Nothing is compiled but the extension.

``-k triton`` compiles: sizes are constants of the kernels, so that each of the 11 random programs compiles its 11 to 16
kernels and each of the 5 models of the engine's cases as many, some 150 compilations of one to two seconds on one core.
"""

from collections.abc import Iterator

import pytest
import torch

from skipkernels.executors.support import CudaSupport

SUPPORT = CudaSupport.probe()
CASES = {"cuda": 100, "triton": 40}
"""Of each kernel set; a test compares."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in str(item.path) and SUPPORT.device:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {SUPPORT.device}"))


@pytest.fixture(params=["cuda", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    if missing := SUPPORT.kernels[request.param]:
        pytest.skip(missing)
    return request.param


@pytest.fixture(params=["predicate", "if_node"])
def conditional(request: pytest.FixtureRequest) -> str:
    if request.param == "if_node" and SUPPORT.if_node:
        pytest.skip(SUPPORT.if_node)
    return request.param


@pytest.fixture(params=["replay", "while"])
def loop(request: pytest.FixtureRequest) -> str:
    if request.param == "while" and SUPPORT.while_node:
        pytest.skip(SUPPORT.while_node)
    return request.param


@pytest.fixture(autouse=True)
def _everything_has_come_to_rest() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
