"""Code compiled for AVX-512 must not end up where a processor without it runs.

An inline function or template that several units emit is kept once by the linker, in the version of any of them. So an
instruction-set unit may share nothing weak with others: its functions are static or in its own namespace.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

OBJECTS = sorted((Path(__file__).resolve().parents[2] / "build").glob("objects-*/csrc-cpu-isa_*.o"))


@pytest.mark.skipif(not OBJECTS or not shutil.which("nm"), reason="needs nm and the objects of a build in the tree")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_instruction_set_units_share_no_weak_symbols(path):
    isa = path.name.removeprefix("csrc-cpu-isa_").split(".")[0]
    listed = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [line for line in listed if any(f" {kind} " in line for kind in "WVu")]
    # nm leaves the names of functions over lambdas in lambdas as they are
    own = (f"skipkernels::{isa}::", f"ZN11skipkernels{len(isa)}{isa}")
    assert [line for line in weak if not any(name in line for name in own)] == []
