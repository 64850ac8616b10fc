"""skipkernels: large language models that decode faster by not doing work an input does not need.

The public names below are imported at their first use, so that ``import skipkernels`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipkernels.decoding.generation import Generation as Generation
    from skipkernels.decoding.generation import SamplingParams as SamplingParams
    from skipkernels.decoding.generation import StreamChunk as StreamChunk
    from skipkernels.engine import Engine as Engine
    from skipkernels.errors import SkipkernelsError as SkipkernelsError
    from skipkernels.integrations.hf_generate import hf_generate as hf_generate
    from skipkernels.skipping.policy import DensePolicy as DensePolicy
    from skipkernels.skipping.policy import FixedPolicy as FixedPolicy
    from skipkernels.skipping.policy import NeuronPolicy as NeuronPolicy
    from skipkernels.skipping.policy import RandomPolicy as RandomPolicy
    from skipkernels.skipping.policy import SkipPolicy as SkipPolicy
    from skipkernels.skipping.policy import TimingPolicy as TimingPolicy
    from skipkernels.skipping.policy_file import load_policy as load_policy
    from skipkernels.skipping.policy_file import save_policy as save_policy

__version__ = "0.1.0"

_HOMES = {
    "Engine": "engine",
    "SkipkernelsError": "errors",
    "Generation": "decoding.generation",
    "SamplingParams": "decoding.generation",
    "StreamChunk": "decoding.generation",
    "hf_generate": "integrations.hf_generate",
    "DensePolicy": "skipping.policy",
    "FixedPolicy": "skipping.policy",
    "NeuronPolicy": "skipping.policy",
    "RandomPolicy": "skipping.policy",
    "SkipPolicy": "skipping.policy",
    "TimingPolicy": "skipping.policy",
    "load_policy": "skipping.policy_file",
    "save_policy": "skipping.policy_file",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
