"""The methods by name."""

from __future__ import annotations

from skipkernels.errors import RequestError
from skipkernels.methods.early_exit import EarlyExit
from skipkernels.methods.ffn_methods import FixedSkip, Full, RandomSkip
from skipkernels.methods.ffn_skip import CatsSkip, FFNSkip, HeldSkip, MixedSkip, NeuronSkip
from skipkernels.methods.method import MethodKind
from skipkernels.methods.short_gpt import ShortGPT
from skipkernels.methods.skip_decode import SkipDecode
from skipkernels.methods.teal import TealSkip

METHODS: dict[str, MethodKind] = {
    kind.name: kind
    for kind in (
        Full(),
        NeuronSkip(),
        FFNSkip(),
        MixedSkip(),
        HeldSkip(),
        CatsSkip(),
        TealSkip(),
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
