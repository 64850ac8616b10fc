"""CacheStatus: how the paged cache is used, for metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CacheStatus:
    """Blocks now, and counts since the engine was made."""

    blocks: int
    used: int
    shared: int
    idle: int
    evictions: int
    prefix_hits: int  # prompt tokens
    prefix_queries: int  # prompt tokens
    preemptions: int
