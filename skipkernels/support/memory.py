"""The most memory that a piece of work takes above what is there before it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

from skipkernels.errors import DeviceError

_RESET_PEAK = "5"  # of the resident set, see proc(5) on clear_refs
_BLOCK = 1 << 20  # bytes; smaller pieces of free memory are too few to matter


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


def give_back_freed_memory() -> None:
    """Hands freed memory back to the system, where the C library can. Loading a model frees many small things that lie
    between those that stay."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
        libc = _libc()
        give_back_freed_memory()
        blocks = _use_up_the_heap(libc)
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
    except (OSError, AttributeError) as error:
        raise DeviceError(
            f"peak memory on a CPU needs Linux's /proc and the GNU C library ({error}); profile without memory"
        ) from error
    before = _status_bytes("VmRSS")
    try:
        work()
        return max(0, _status_bytes("VmHWM") - before)
    finally:
        for block in blocks:
            libc.free(block)


_MALLINFO2 = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _MALLINFO2]


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    libc.mallinfo2.restype = _Mallinfo2
    return libc


def _use_up_the_heap(libc: ctypes.CDLL) -> list[int]:
    """Takes what the allocator holds free, in blocks that are never written, until it asks the system for more.

    malloc_trim leaves the end of the heap alone once another mapping lies behind it. Work that fits in there would
    seem to take nothing.
    """
    blocks: list[int] = []
    before = _from_the_system(libc)
    while _from_the_system(libc) == before:
        blocks.append(libc.malloc(_BLOCK))
    return blocks


def _from_the_system(libc: ctypes.CDLL) -> int:
    info = libc.mallinfo2()
    return info.arena + info.hblkhd


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise DeviceError(f"/proc/self/status holds no {field}")


def free_memory_bytes(device: str) -> int:
    """What can still be allocated: on a CPU what the system calls available, on a CUDA device what its driver says."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(torch.device(device))[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
