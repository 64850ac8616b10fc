"""The compiled extension; csrc/bindings.cpp defines what is in it."""

from typing import Any

def __getattr__(name: str) -> Any: ...
