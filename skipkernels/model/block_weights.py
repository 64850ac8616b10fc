"""From parameters to packed weights in formats of their own: those of a quantised file, or quantised while read."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence

import torch

from skipkernels.errors import PolicyError
from skipkernels.model.config import ModelConfig, dtype_name
from skipkernels.model.family import FAMILIES
from skipkernels.model.matrix import BLOCK_FORMATS, FLOAT_FORMATS, AnyMatrix, block_formats_on, merged, stacked
from skipkernels.model.parameters import Parameters
from skipkernels.model.recipe import large_matrices
from skipkernels.model.weights import (
    ModelWeights,
    allocate_weights,
    empty_matrix,
    no_neurons_of_experts,
    saved_views,
    warn_of_nan,
)

logger = logging.getLogger(__name__)

PARTS = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
"""The matrices of a layer, and the Hugging Face parameters in them from top to bottom."""


def _names_of_experts(config: ModelConfig, layer: int) -> dict[str, list[str]]:
    """The matrices of a layer's FFN with experts, and what is in them from top to bottom, by the names in files."""
    family, prefix = FAMILIES[config.model_type].experts, f"model.layers.{layer}."
    assert family is not None
    of_each = {"gate_up_proj": (family.saved_gate, family.saved_up), "down_proj": (family.saved_down,)}
    names = {
        field: [prefix + name.format(expert) for expert in range(config.num_experts) for name in parts]
        for field, parts in of_each.items()
    }
    return {"router": [prefix + family.saved_router], **names}


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
    views = saved_views(config, weights)
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
    """Packed weights in the parameters' formats. A matrix whose format no kernels of the device read, or that is
    stacked with floats (of experts, with another format), is dequantised to ``float_dtype``, which is logged. Routers,
    which are small and decide much, stay floats of their own dtype. Blocks lie as in the file: an executor arranges
    them (``weights.interleave``), with ``neuron_rows`` so that single neurons can be left out.

    Raises:
        PolicyError: ``neuron_rows`` with experts in blocks.
    """
    shapes_only = saved_views(config, allocate_weights(config, torch.float32, 1, "meta"))
    ffns = {
        layer: _names_of_experts(config, layer)
        for layer in range(config.num_hidden_layers)
        if config.has_experts(layer)
    }
    routers = {name for ffn in ffns.values() for name in ffn["router"]}
    names = large_matrices(config, {name: tuple(view.shape) for name, view in shapes_only.items()})
    dtype, block_formats = float_dtype(parameters, names), block_formats_on(device)
    if neuron_rows:
        of_experts = {name for ffn in ffns.values() for listed in ffn.values() for name in listed} - routers
        blocks = {parameters.format(name) for name in of_experts} & block_formats.keys()  # others become floats
        if reason := no_neurons_of_experts(blocks):
            raise PolicyError(reason)
    held = {name: parameters.format(name) for name in names}
    without = Counter(
        _told(kind, block_formats) for kind in held.values() if kind not in block_formats.keys() | FLOAT_FORMATS.keys()
    )
    for kind, count in without.items():
        logger.warning(
            "%s: no %s kernels read %s; %d matrices are dequantised to %s, %d significant bits of each weight",
            parameters.source,
            "GPU" if torch.device(device).type == "cuda" else "CPU",
            kind.upper(),
            count,
            dtype_name(dtype),
            1 - round(math.log2(torch.finfo(dtype).eps)),
        )
    weights = allocate_weights(config, dtype, max_seq_len, device, neuron_rows, vectors_only=True)
    weights.cache_dtype = dtype
    vectors = {name: view for name, view in saved_views(config, weights).items() if view.device.type != "meta"}
    for name, view in vectors.items():
        parameters.copy_floats(name, view)
    beside_floats: Counter[str] = Counter()

    def matrix(*parts: str, transposed: bool = False, of_experts: bool = False) -> AnyMatrix:
        formats = [parameters.format(name) for name in parts]
        if all(format in block_formats for format in formats) and not (of_experts and len(set(formats)) > 1):
            blocks = [parameters.blocks(name).to(device) for name in parts]
            return stacked(merged(blocks) if of_experts else blocks)
        rows, columns = [shapes_only[name].shape[0] for name in parts], shapes_only[parts[0]].shape[1]
        own = FLOAT_FORMATS.get(formats[0], dtype) if parts[0] in routers else dtype
        if transposed:  # of experts side by side, each one neuron a row
            floats = empty_matrix(len(parts) * columns, rows[0], own, device).T
            places = floats.split(columns, dim=1)
        else:
            floats = empty_matrix(sum(rows), columns, own, device)
            places = floats.split(rows)
        for name, part in zip(parts, places, strict=True):
            parameters.copy_floats(name, part)
        beside_floats.update(format for format in formats if format in block_formats)
        return floats

    weights.embed_tokens = matrix("model.embed_tokens.weight")
    tied = config.tie_word_embeddings
    weights.lm_head = weights.embed_tokens if tied else matrix("lm_head.weight")
    for index, layer in enumerate(weights.layers):
        ffn = ffns.get(index, {})
        for field, listed in ffn.items():
            transposed = neuron_rows and field == "down_proj"
            setattr(layer, field, matrix(*listed, transposed=transposed, of_experts=field != "router"))
        for field, parts in PARTS.items():
            if field in ffn:
                continue
            whole = f"model.layers.{index}.{parts[0].rpartition('.')[0]}.{field}.weight"  # of families that fuse them
            names = [whole] if whole in shapes_only else [f"model.layers.{index}.{part}.weight" for part in parts]
            setattr(layer, field, matrix(*names, transposed=neuron_rows and field == "down_proj"))
    for format, count in beside_floats.items():
        logger.warning(
            "%s: %d matrices in %s are dequantised to %s: they are stacked with floats, or experts with other formats "
            "(q, k and v; gate and up; of all experts)",
            parameters.source,
            count,
            format.upper(),
            dtype_name(dtype),
        )
    warn_of_nan(vectors | {name: tensor for name, tensor in weights.tensors() if isinstance(tensor, torch.Tensor)})
    weights.contents = parameters.contents()
    return weights


def float_dtype(parameters: Parameters, names: Sequence[str]) -> torch.dtype:
    """Of the KV cache, and of what is dequantised: that of the matrices of floats where they are of one dtype, else
    bf16."""
    floats = {parameters.format(name) for name in names} & FLOAT_FORMATS.keys()
    return FLOAT_FORMATS[floats.pop()] if len(floats) == 1 else torch.bfloat16


def _told(kind: str, block_formats: Collection[str]) -> str:
    """A format that is none of blocks, without the reason where the device has no kernels for those blocks either."""
    name = kind.partition(" ")[0]
    return name if name in BLOCK_FORMATS.keys() - block_formats else kind
