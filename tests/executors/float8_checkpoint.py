"""A small fp8 checkpoint, and what the reference generates from its weights as floats, which hold them exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skipkernels.decoding.generation import Generation
from tests.models import tiny_engine, tiny_module
from tests.packed_checkpoints import ALL, save_fp8

TILES: dict[str, tuple[tuple[int, int], list[int] | None]] = {
    "tiles": ((128, 128), [128, 128]),
    "rows": ((1, ALL), None),
    "all": ((ALL, ALL), None),
}
"""Of one scale each, and what config.json says of them."""


def float8_checkpoint(folder: Path, tiles: str, **sizes: int) -> Path:
    tile, told = TILES[tiles]
    module = tiny_module(**{"hidden_size": 128, "intermediate_size": 256, **sizes})
    save_fp8(folder, module, tile, "weight_scale", told)
    return folder


def as_floats(folder: Path, prompts: list[list[int]], new_tokens: int, **options: Any) -> list[Generation]:
    engine = tiny_engine(module=folder, dtype="fp32", executor="reference", **options)
    return engine.generate(prompts, max_new_tokens=new_tokens)
