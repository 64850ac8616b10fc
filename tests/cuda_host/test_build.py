"""What is compiled again and what is not."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_host import build
from tests.cuda_host.build import build_host_extension
from tests.cuda_host.controls import HostRuntime

SOURCE = """
#include "number.h"
extern "C" __attribute__((visibility("default"))) int number() { return kNumber + SUMMAND; }
"""


@pytest.fixture
def folder():
    """The same in every run, whose libraries are therefore reused too."""
    path = build.CACHE / "test_build"
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(folder, number):
    (folder / "number.h").write_text(f"constexpr int kNumber = {number};\n")
    (folder / "source.cu").write_text(SOURCE)
    return folder / "source.cu"


def test_a_change_of_header_or_flags_makes_another_library(folder):
    libraries = []
    for number, summand in [(1, 10), (2, 10), (2, 20)]:
        source = write(folder, number)
        libraries.append(build_host_extension([source], flags=[f"-DSUMMAND={summand}"]))
        assert HostRuntime(libraries[-1]).call("number") == number + summand
    assert len(set(libraries)) == 3


def test_nothing_is_compiled_twice(folder, monkeypatch):
    source = write(folder, 3)
    library = build_host_extension([source], flags=["-DSUMMAND=1"])
    monkeypatch.setattr(build, "run", lambda command: pytest.fail(f"ran {command}"))
    assert build_host_extension([source], flags=["-DSUMMAND=1"]) == library


def test_a_compiler_error_is_passed_on(folder):
    with pytest.raises(RuntimeError, match=r"SUMMAND.* was not declared"):
        build_host_extension([write(folder, 1)])


@pytest.mark.slow
def test_fibers_without_assembly(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-DCUDA_HOST_UCONTEXT")
    runtime = HostRuntime(build_host_extension([build.HERE / "kernels" / "numbers.cu"]), seed=3)
    out = torch.full((2 * 3 * 2 * 5 * 2 * 4, 12), -1, dtype=torch.int32)
    runtime.launch("launch_describe_thread", out)
    votes = torch.full((32,), -1, dtype=torch.int32)
    runtime.launch("launch_exchange", 1, 0xFFFFFFFF, 1, 32, torch.arange(32, dtype=torch.int32), votes)
    assert (out >= 0).all()
    assert votes.tolist() == [lane ^ 1 for lane in range(32)]
