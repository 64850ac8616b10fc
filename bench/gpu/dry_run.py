"""The suite without a GPU: tiny sizes, the fake CUDA runtime of the tests, and first_measurements.cu on the CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from skipkernels.executors.runtime import CudaRuntime
from tests.cuda_host.build import ROOT, build_core_extension, build_host_extension, load_core_extension
from tests.cuda_host.controls import HostRuntime

TINY = {
    "hidden_size": 256,  # a block of the K formats
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}


@cache
def fake_native() -> ModuleType:
    library = build_core_extension()
    HostRuntime(library)  # from a clean state
    return load_core_extension(library)


class FakeDevice(CudaRuntime):
    """A GPU whose memory is that of the CPU."""

    def __init__(self, **options: Any) -> None:
        super().__init__(torch.device("cuda", 0), **options)
        self.native = fake_native()

    def stream(self) -> int:
        return 0


def first_measurements(rows: Path, sources: list[str]) -> None:
    """Runs the program on the CPU; its figures are those of the fake runtime, and mean nothing."""
    flags = ["-DFIRST_DRY_RUN=1", f"-I{ROOT / 'csrc'}"]
    library = build_host_extension([ROOT / source for source in sources], name="first.so", flags=flags)
    HostRuntime(library)
    with rows.open("a") as out:
        os.dup2(out.fileno(), 1)
        status = ctypes.CDLL(str(library)).first_measurements()
    sys.exit(status)


if __name__ == "__main__":
    first_measurements(Path(sys.argv[1]), sys.argv[2:])
