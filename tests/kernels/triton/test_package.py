"""Triton is optional: nothing imports it but its kernels, and without it they say what is missing."""

import subprocess
import sys


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_the_rest_of_the_package_does_not_import_triton() -> None:
    program = "import sys, skipkernels, skipkernels.engine, skipkernels.executors; print('triton' in sys.modules)"
    assert run(program) == "False"


def test_a_missing_triton_is_an_error_that_names_the_extra() -> None:
    program = """
import sys
sys.modules["triton"] = None  # as if it were not installed
from skipkernels.errors import DeviceError
try:
    import skipkernels.kernels.triton
except DeviceError as error:
    print(error)
"""
    assert run(program) == "the triton kernels need Triton (Linux): pip install skipkernels[triton]"
