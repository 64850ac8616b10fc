"""In which formats of blocks a checkpoint's experts will be held, told before any of it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from skipkernels.model.checkpoint import load_config, resolve_checkpoint
from skipkernels.model.config import ModelConfig
from skipkernels.model.gguf_file import GgufFile
from skipkernels.model.matrix import BLOCK_FORMATS
from skipkernels.model.recipe import resolve_weights

_EXPERTS = "_exps."
"""In the names of a GGUF's stacks of experts."""


def blocks_of_experts(model: str | Path, dtype: str | torch.dtype | None = None) -> set[str]:
    """Formats, or the recipe ``dtype`` that makes them; empty: there are no experts, or they will be floats."""
    weights, source = resolve_weights(dtype), resolve_checkpoint(model)
    if isinstance(weights, torch.dtype):
        return set()
    if not ModelConfig.from_hf(load_config(source).get_text_config(decoder=True)).num_experts:
        return set()
    if weights is not None:
        return {weights}
    if not source.is_file():
        return set()  # gpt-oss's MXFP4 becomes floats; other packed checkpoints of experts are not read
    stacks = {tensor.type.name.lower() for name, tensor in GgufFile(source).tensors.items() if _EXPERTS in name}
    return stacks & BLOCK_FORMATS.keys()
