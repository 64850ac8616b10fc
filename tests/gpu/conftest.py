"""Tests on a real GPU: ``pytest -m gpu``, skipped where there is none. They need no package beyond pytest."""

import pytest
import torch

from skipkernels.executors.support import CudaSupport

SUPPORT = CudaSupport.probe()


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
def _everything_has_come_to_rest():
    yield
    torch.cuda.synchronize()
