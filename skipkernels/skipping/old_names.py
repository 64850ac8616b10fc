"""Parameters of policies under their names of earlier releases, which policy files and callers may still hold."""

from __future__ import annotations

from functools import wraps
from operator import attrgetter
from typing import Any, TypeVar

from skipkernels.errors import PolicyError

NEW_NAMES = {"cold_start": "first_dense_layers", "cold_end": "last_dense_layers"}

Class = TypeVar("Class", bound=type)


def renamed(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` with every old name replaced by the new one.

    Raises:
        PolicyError: a parameter is given under both names.
    """
    for old, new in NEW_NAMES.items():
        if old in values and new in values:
            raise PolicyError(f"{old} is the old name of {new}; give {new} only")
    return {NEW_NAMES.get(name, name): value for name, value in values.items()}


def with_old_names(kind: Class) -> Class:
    """Class decorator: ``kind`` takes the old names as keyword arguments and has them as attributes."""
    init = kind.__init__  # type: ignore[misc]

    @wraps(init)
    def __init__(self: object, *args: Any, **values: Any) -> None:
        init(self, *args, **renamed(values))

    kind.__init__ = __init__  # type: ignore[misc]
    for old, new in NEW_NAMES.items():
        setattr(kind, old, property(attrgetter(new)))
    return kind
