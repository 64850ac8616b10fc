"""No kernel that nvcc compiled spills registers, on any architecture that it was built for. Read from the objects."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from skipkernels import _C
from tests.cuda_host.build import ROOT, load_module

nvidia = pytest.importorskip("triton.backends.nvidia")
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
SETUP = load_module("skipkernels_setup", ROOT / "setup.py")
TARGETS = [target.rpartition("=")[2] for target in SETUP.CUDA_ARCHITECTURES]
SOURCES = [source for source in SETUP.CUDA_SOURCES if source.endswith(".cu")]

ARRAYS = {"qkv_rope_append": 16, "sample": 16}
"""Bytes of a thread's stack that are no spill but an array whose index is known only when it runs."""
SPILLS = {("down_proj_add", "sm_89"): 8, ("experts_down_proj_add", "sm_89"): 32}
"""Of matrices in bf16 with 8 rows, and of experts in fp32: a few bytes of L1, where more registers would cost the
second kernel of a multiprocessor."""


@pytest.mark.skipif(not _C.cuda_built, reason="the extension was built without nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: Path(source).stem)
def test_no_kernel_spills(source: str) -> None:
    compiled = SETUP.object_folder() / f"{source.replace('/', '-')}.o"
    output = subprocess.run([CUOBJDUMP, "-res-usage", compiled], capture_output=True, text=True, check=True).stdout
    _, *parts = re.split(r"^arch = (\w+)$", output, flags=re.MULTILINE)
    kernels = dict(zip(parts[::2], parts[1::2], strict=True))
    name = Path(source).stem
    built = [target for target in TARGETS if target in kernels]
    assert built, f"built for none of {TARGETS}: unset SKIPKERNELS_CUDA_ARCH and build the extension again"
    for target in built:
        usages = re.findall(r"REG:(\d+) STACK:(\d+)", text := kernels[target])
        assert usages, text
        most = max(ARRAYS.get(name, 0), SPILLS.get((name, target), 0))
        assert max(int(stack) for _, stack in usages) <= most, f"{target} spills:\n{text}"
        registers = max(int(count) for count, _ in usages)  # half of those of a block of 256: two kernels share an SM
        assert registers <= 128, f"{target} takes {registers} registers"
