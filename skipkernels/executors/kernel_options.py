"""KernelOptions: ways in which the CUDA kernels of a step save time, each to be switched off to measure its gain."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class KernelOptions:
    """The switches of csrc/cuda/plan.h. None changes a bit of any result.

    Args:
        gate_beside_qkv: a skip_gate is an extra block of the qkv_rope_append behind it.
        late_prefetch: attention prefetches weights behind its wait for the kernel before it.
        max_prefetch_bytes: what one attention or sample prefetches at most; -1: as the device suits, 0: nothing.
        evict_first: weights leave L2 before all else.
        early_trigger: a matrix kernel without a row lets the next one start before its own wait.
        one_carveout: all kernels ask for the same split of L1.
        touch_settled: what no kernel in flight writes is brought near before the wait.
        prefetch_first_layer: sample's idle blocks prefetch what the next step begins with.
    """

    gate_beside_qkv: bool = True
    late_prefetch: bool = True
    max_prefetch_bytes: int = -1
    evict_first: bool = True
    early_trigger: bool = True
    one_carveout: bool = True
    touch_settled: bool = True
    prefetch_first_layer: bool = True

    def native(self, native: ModuleType) -> Any:
        """The extension's own object."""
        options = native.CudaOptions()
        for item in fields(self):
            setattr(options, item.name, getattr(self, item.name))
        return options


SWITCHES = tuple(item.name for item in fields(KernelOptions) if isinstance(item.default, bool))
