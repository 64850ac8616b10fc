"""From parameters to packed weights in formats of their own: those of a quantised file, or quantised while read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig, dtype_name
from skipkernels.model.matrix import BLOCK_FORMATS, FLOAT_FORMATS, AnyMatrix, stacked
from skipkernels.model.parameters import Parameters
from skipkernels.model.weights import ModelWeights, allocate_weights, empty_matrix, parameter_views, warn_of_nan

logger = logging.getLogger(__name__)

PARTS = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
"""The matrices of a layer, and the Hugging Face parameters in them from top to bottom."""


def load_as_floats(
    parameters: Parameters,
    config: ModelConfig,
    dtype: torch.dtype,
    max_seq_len: int,
    device: torch.device | str = "cpu",
    neuron_rows: bool = False,
) -> ModelWeights:
    """Packed weights, all of them floats of ``dtype``."""
    weights = allocate_weights(config, dtype, max_seq_len, device, neuron_rows)
    views = parameter_views(config, weights)
    for name, view in views.items():
        parameters.copy_floats(name, view)
    warn_of_nan(views)
    weights.contents = parameters.contents()
    return weights


def load_in_formats(
    parameters: Parameters,
    config: ModelConfig,
    max_seq_len: int,
    device: torch.device | str = "cpu",
    neuron_rows: bool = False,
) -> ModelWeights:
    """Packed weights in the parameters' formats. A matrix whose format has no kernels, or that is stacked with floats,
    is dequantised to ``float_dtype``, which is logged.

    Raises:
        ModelError: ``neuron_rows``; blocks cannot lie transposed.
    """
    if neuron_rows:
        raise ModelError(
            f"{parameters.source}: single neurons are left out of float weights only; load it with dtype bf16 "
            "(--dtype bf16), or leave out whole blocks only"
        )
    shapes_only = parameter_views(config, allocate_weights(config, torch.float32, 1, "meta"))
    names = [name for name, view in shapes_only.items() if view.dim() == 2]
    dtype = float_dtype(parameters, names)
    without = Counter(kind for name in names if (kind := parameters.format(name)) not in BLOCK_FORMATS | FLOAT_FORMATS)
    for kind, count in without.items():
        logger.warning(
            "%s: no kernels read %s; %d matrices are dequantised to %s",
            parameters.source,
            kind.upper(),
            count,
            dtype_name(dtype),
        )
    weights = allocate_weights(config, dtype, max_seq_len, device, vectors_only=True)
    weights.cache_dtype = dtype
    vectors = {name: view for name, view in parameter_views(config, weights).items() if view.device.type != "meta"}
    for name, view in vectors.items():
        parameters.copy_floats(name, view)
    beside_floats: Counter[str] = Counter()

    def matrix(*parts: str) -> AnyMatrix:
        formats = [parameters.format(name) for name in parts]
        if all(format in BLOCK_FORMATS for format in formats):
            return stacked([parameters.blocks(name).to(device) for name in parts])
        rows = [shapes_only[name].shape[0] for name in parts]
        floats = empty_matrix(sum(rows), shapes_only[parts[0]].shape[1], dtype, device)
        for name, part in zip(parts, floats.split(rows), strict=True):
            parameters.copy_floats(name, part)
        beside_floats.update(format for format in formats if format in BLOCK_FORMATS)
        return floats

    weights.embed_tokens = matrix("model.embed_tokens.weight")
    tied = config.tie_word_embeddings
    weights.lm_head = weights.embed_tokens if tied else matrix("lm_head.weight")
    for index, layer in enumerate(weights.layers):
        for field, parts in PARTS.items():
            whole = f"model.layers.{index}.{parts[0].rpartition('.')[0]}.{field}.weight"  # of families that fuse them
            names = [whole] if whole in shapes_only else [f"model.layers.{index}.{part}.weight" for part in parts]
            setattr(layer, field, matrix(*names))
    for format, count in beside_floats.items():
        logger.warning(
            "%s: %d matrices in %s are dequantised to %s: they are stacked with floats (q, k and v, or gate and up)",
            parameters.source,
            count,
            format.upper(),
            dtype_name(dtype),
        )
    warn_of_nan(vectors | {name: tensor for name, tensor in weights.tensors() if isinstance(tensor, torch.Tensor)})
    weights.contents = parameters.contents()
    return weights


def float_dtype(parameters: Parameters, names: Sequence[str]) -> torch.dtype:
    """Of the KV cache, and of what is dequantised: that of the floats where all matrices are floats of one dtype, else
    bf16."""
    formats = {parameters.format(name) for name in names}
    return FLOAT_FORMATS.get(formats.pop(), torch.bfloat16) if len(formats) == 1 else torch.bfloat16
