"""Settings: the entries of a checkpoint's ``quantization_config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skipkernels.errors import ModelError

Settings = Mapping[str, Any]


def whole_number(settings: Settings, *names: str, default: int | None = None) -> int:
    """The first entry of ``names`` that is there.

    Raises:
        ModelError: it is no whole number, or none is there and there is no default.
    """
    value = next((settings[name] for name in names if settings.get(name) is not None), default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ModelError(f"quantization_config: {names[0]} must be a whole number, got {value!r}")
    return value


def group_size(settings: Settings, *names: str) -> int:
    """Neighbouring columns under one scale; -1: all of a row's."""
    size = whole_number(settings, *names)
    if size != -1 and size < 1:
        raise ModelError(f"quantization_config: {names[0]} must be at least 1, or -1 for whole rows, got {size}")
    return size


def tile_size(settings: Settings, name: str) -> tuple[int, int]:
    """Rows and columns under one scale."""
    found = settings.get(name)
    if isinstance(found, list | tuple) and len(found) == 2 and all(type(size) is int and size > 0 for size in found):
        return found[0], found[1]
    raise ModelError(f"quantization_config: {name} must be two whole numbers of at least 1, got {found!r}")


def refuse(method: str, what: str, supported: str) -> ModelError:
    """An error that says what of a method is not read, and what is."""
    return ModelError(f"quantised by {method} with {what}, which is not read; supported: {supported}")
