"""skipkernels: large language models that decode faster by not doing work an input does not need.

The public names below are imported at their first use, so that ``import skipkernels`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipkernels.engine import Engine as Engine
    from skipkernels.errors import SkipkernelsError as SkipkernelsError
    from skipkernels.generation import Generation as Generation
    from skipkernels.generation import SamplingParams as SamplingParams
    from skipkernels.generation import StreamChunk as StreamChunk
    from skipkernels.integrations.hf_generate import hf_generate as hf_generate
    from skipkernels.policy import DensePolicy as DensePolicy
    from skipkernels.policy import FixedPolicy as FixedPolicy
    from skipkernels.policy import RandomPolicy as RandomPolicy
    from skipkernels.policy import SkipPolicy as SkipPolicy
    from skipkernels.policy import TimingPolicy as TimingPolicy
    from skipkernels.policy_file import load_policy as load_policy
    from skipkernels.policy_file import save_policy as save_policy

__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine",
    "SkipkernelsError": "errors",
    "Generation": "generation",
    "SamplingParams": "generation",
    "StreamChunk": "generation",
    "hf_generate": "integrations.hf_generate",
    "DensePolicy": "policy",
    "FixedPolicy": "policy",
    "RandomPolicy": "policy",
    "SkipPolicy": "policy",
    "TimingPolicy": "policy",
    "load_policy": "policy_file",
    "save_policy": "policy_file",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
