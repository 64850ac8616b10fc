"""The most memory that a piece of work takes above what is there before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

from skipkernels.errors import DeviceError

_RESET_PEAK = "5"  # of the resident set, see proc(5) on clear_refs


def peak_memory_bytes(device: str, work: Callable[[], object]) -> int:
    """Runs ``work`` and measures its peak: allocated bytes on a CUDA device, resident bytes of this process on a CPU.

    On a CPU, free memory is given back to the system first, so that what an earlier run left is not reused unseen.
    Whatever other threads of this process take in the meantime counts too.

    Raises:
        DeviceError: nothing to measure with on this device.
    """
    if device.startswith("cuda"):
        return _peak_on_cuda(device, work)
    if device.startswith("cpu"):
        return _peak_on_cpu(work)
    raise DeviceError(f"peak memory can be measured on cpu and cuda, not on {device}; profile without memory")


def _peak_on_cuda(device: str, work: Callable[[], object]) -> int:
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(work: Callable[[], object]) -> int:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except (OSError, AttributeError) as error:
        raise DeviceError(
            f"peak memory on a CPU needs Linux's /proc and the GNU C library ({error}); profile without memory"
        ) from error
    before = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise DeviceError(f"/proc/self/status holds no {field}")
