"""What every test runs under."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from tests.models import byte_tokenizer, release_rows

ROOT = Path(__file__).resolve().parents[1]
SERIAL = ("tests/server/", "tests/benchmark/", "tests/cli/test_serve.py", "tests/modality/test_runtime.py")
"""Tests of real servers and real times; another process beside them would make them late."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(ROOT).as_posix().startswith(SERIAL):
            item.add_marker(pytest.mark.serial)


settings.register_profile(
    "skipkernels",
    max_examples=25,
    deadline=None,  # other work shares the processor
    derandomize=True,  # the same examples everywhere; the slow sweeps look further
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("skipkernels")
transformers_logging.disable_progress_bar()
torch.set_num_threads(1)  # tensors are tiny: a second thread costs more than it brings
if "PYTEST_XDIST_WORKER" in os.environ:
    # what a test starts beside other tests: two threads that wait for each other on taken processors take many times
    # the time of one
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def rows_are_released() -> Iterator[None]:
    yield
    release_rows()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """One token for each byte, then <s>, </s>."""
    return byte_tokenizer()
