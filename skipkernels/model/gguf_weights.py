"""From the tensors of a GGUF file to packed weights, in the file's formats or dequantised."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig, dtype_name
from skipkernels.model.gguf_tensors import GgufTensors
from skipkernels.model.matrix import BLOCK_FORMATS, FLOAT_FORMATS, AnyMatrix, stacked
from skipkernels.model.weights import ModelWeights, allocate_weights, empty_matrix, parameter_views, warn_of_nan

PARTS = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
"""The matrices of a layer, and the Hugging Face parameters in them from top to bottom."""


def load_gguf(
    tensors: GgufTensors,
    config: ModelConfig,
    dtype: torch.dtype | None,
    max_seq_len: int,
    device: torch.device | str = "cpu",
    neuron_rows: bool = False,
) -> ModelWeights:
    """Packed weights. With ``dtype`` all of them are floats; with None a matrix keeps the file's format, and one whose
    format has no kernels, or that is stacked with floats, is dequantised to ``float_dtype``.

    Raises:
        ModelError: ``neuron_rows`` without ``dtype``; blocks cannot lie transposed.
    """
    if dtype is not None:
        weights = allocate_weights(config, dtype, max_seq_len, device, neuron_rows)
        views = parameter_views(config, weights)
        for name, view in views.items():
            tensors.copy_floats(name, view)
    elif neuron_rows:
        raise ModelError(
            f"{tensors.file.path}: neurons are left out of float weights only; load it with "
            "dtype bf16, or leave out whole blocks only"
        )
    else:
        weights = _in_own_formats(tensors, config, max_seq_len, device)
        views = {name: tensor for name, tensor in weights.tensors() if isinstance(tensor, torch.Tensor)}
    warn_of_nan(views)
    weights.contents = tensors.file.contents()
    return weights


def float_dtype(tensors: GgufTensors, names: Sequence[str]) -> torch.dtype:
    """Of the KV cache, and of what is dequantised: that of the file's floats where all its matrices are floats of one
    dtype, else bf16."""
    formats = {tensors.format(name) for name in names}
    return FLOAT_FORMATS.get(formats.pop(), torch.bfloat16) if len(formats) == 1 else torch.bfloat16


def _in_own_formats(
    tensors: GgufTensors, config: ModelConfig, max_seq_len: int, device: torch.device | str
) -> ModelWeights:
    shapes_only = parameter_views(config, allocate_weights(config, torch.float32, 1, "meta"))
    names = [name for name, view in shapes_only.items() if view.dim() == 2]
    dtype = float_dtype(tensors, names)
    without = [name for name in names if tensors.format(name) not in BLOCK_FORMATS | FLOAT_FORMATS]
    tensors.say_what_is_dequantised(without, dtype_name(dtype))
    weights = allocate_weights(config, dtype, max_seq_len, device, vectors_only=True)
    weights.cache_dtype = dtype
    for name, view in parameter_views(config, weights).items():
        if view.device.type != "meta":
            tensors.copy_floats(name, view)

    def matrix(*parts: str) -> AnyMatrix:
        if all(tensors.format(name) in BLOCK_FORMATS for name in parts):
            return stacked([tensors.blocks(name).to(device) for name in parts])
        rows = [shapes_only[name].shape[0] for name in parts]
        floats = empty_matrix(sum(rows), shapes_only[parts[0]].shape[1], dtype, device)
        for name, part in zip(parts, floats.split(rows), strict=True):
            tensors.copy_floats(name, part)
        return floats

    tied = config.tie_word_embeddings
    weights.embed_tokens = matrix("model.embed_tokens.weight")
    weights.lm_head = weights.embed_tokens if tied else matrix("lm_head.weight")
    for index, layer in enumerate(weights.layers):
        for field, parts in PARTS.items():
            setattr(layer, field, matrix(*(f"model.layers.{index}.{part}.weight" for part in parts)))
    return weights
