"""nvcc compiles every kernel for the architectures that are shipped, and none spills registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda_host.build import ROOT, load_module

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TARGETS = load_module("skipkernels_setup", ROOT / "setup.py").CUDA_ARCHITECTURES
NEWEST = "arch=compute_90a,code=sm_90a"
targets = [
    pytest.param(target, id=target.rpartition("=")[2], marks=[] if target == NEWEST else pytest.mark.slow)
    for target in TARGETS
]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not in PATH")
@pytest.mark.parametrize("target", targets)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_spills(source: Path, target: str, tmp_path: Path) -> None:
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode={target}", "-Icsrc", "-Xptxas=-v", "-c", str(source)]
    output = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.o")], cwd=ROOT, capture_output=True, text=True, check=True
    ).stderr
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", output)]
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", output)]
    assert registers, output
    assert max(spills) == 0, output
    assert max(registers) <= 128, output  # half of the register file for a block of 256: two kernels share an SM


def test_the_newest_target_is_among_those_shipped() -> None:
    assert NEWEST in TARGETS
