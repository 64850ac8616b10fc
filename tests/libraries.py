"""Compiles what the tests of the CUDA sources load, on all processors, before they begin: none waits for a compiler.

Run with ``python -m tests.libraries``; it takes minutes the first time. Tests without it compile what they need.
"""

from tests.cuda import kernels
from tests.cuda_host.build import build_core_extension


def build_all() -> None:
    build_core_extension()
    kernels.build()
    kernels.build(races=True)


if __name__ == "__main__":
    build_all()
