"""The methods by name."""

from __future__ import annotations

from skipkernels.errors import RequestError
from skipkernels.quality.early_exit import EarlyExit
from skipkernels.quality.ffn_methods import FixedSkip, Full, RandomSkip
from skipkernels.quality.ffn_skip import FFNSkip, HeldSkip
from skipkernels.quality.method import MethodKind
from skipkernels.quality.short_gpt import ShortGPT
from skipkernels.quality.skip_decode import SkipDecode

METHODS: dict[str, MethodKind] = {
    kind.name: kind
    for kind in (
        Full(),
        FFNSkip(),
        HeldSkip(),
        RandomSkip(),
        FixedSkip(),
        SkipDecode(),
        ShortGPT(),
        EarlyExit(),
    )
}
DEFAULT_METHODS = tuple(name for name in METHODS if name != HeldSkip.name)


def method_kind(name: str) -> MethodKind:
    """The method of that name.

    Raises:
        RequestError: there is none.
    """
    if name not in METHODS:
        raise RequestError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
    return METHODS[name]
