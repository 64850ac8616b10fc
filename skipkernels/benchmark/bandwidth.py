"""What the memory can do now, for every figure that is given as a share of it."""

from __future__ import annotations

import statistics

import torch

from skipkernels import _C

PROBE_BYTES = 512 << 20  # far beyond any cache
PROBE_REPEATS = 3


def bandwidth_gb_per_s(device: torch.device, num_threads: int) -> float:
    """Median of a few full passes over a large buffer: read by ``num_threads`` on a CPU, copied on a GPU (both ways
    counted)."""
    if device.type == "cpu":
        return PROBE_BYTES / 1e9 / statistics.median(_C.measure_read(PROBE_BYTES, PROBE_REPEATS, num_threads))
    source = torch.empty(PROBE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    with torch.cuda.device(device):  # whose current stream an event is recorded in
        for _ in range(PROBE_REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
    return 2 * PROBE_BYTES / 1e9 / statistics.median(seconds)
