"""The machine this runs on."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

MAX_THREADS = 1024
"""More are no use to anybody, and a number out of a mistake would take the process down."""


def processor_name() -> str:
    """The processor's model name as the kernel gives it, or what the platform calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def usable_processors() -> int:
    """Processors that this process may use: its affinity, and the time that its control group grants. Threads wait for
    each other, so one that is throttled stops all: a share of a processor counts for nothing."""
    allowed = len(os.sched_getaffinity(0))
    quota = processor_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def default_threads() -> int:
    """Threads where nobody asked for a number: the usable processors, or fewer where OMP_NUM_THREADS or
    ``torch.set_num_threads`` say so."""
    import torch

    return max(1, min(usable_processors(), torch.get_num_threads()))


def processor_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors' worth of time that the control group grants (version 2 or 1), the least of all levels; None: no
    limit."""
    quotas = [quota for group in _groups(root, own) if (quota := _quota(group)) is not None]
    return min(quotas, default=None)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's group and of those above it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, name = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        for base in (root / "cpu", root / "cpu,cpuacct") if controllers else (root,):
            folder = base / name.strip("/")
            while folder != base and base in folder.parents:
                yield folder
                folder = folder.parent
            yield base
    yield root


def _quota(group: Path) -> float | None:
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return float(limit) / float(period) if limit != "max" and float(limit) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
