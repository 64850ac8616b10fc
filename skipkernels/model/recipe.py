"""Recipe: which format each matrix of a model is quantised to, under the names that users know from llama.cpp."""

from __future__ import annotations

import logging
import re
from collections import Counter

import torch

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig, resolve_dtype
from skipkernels.model.family import FAMILIES
from skipkernels.model.matrix import BLOCK_FORMATS
from skipkernels.model.shards import EMBEDDINGS, HEAD

logger = logging.getLogger(__name__)

RECIPES = {
    "q8_0": "q8_0",
    "q6_k": "q6_k",
    "q5_1": "q5_1",
    "q5_0": "q5_0",
    "q4_k_m": "q4_k",
    "q4_1": "q4_1",
    "q4_0": "q4_0",
}
"""Name -> the format of most matrices."""
_INSTEAD = {"q4_k": "q5_0", "q6_k": "q8_0"}
"""What a format of 256 columns gives way to where they do not divide a matrix's, as in llama.cpp."""
_WIDE = re.compile(r"model\.layers\.(\d+)\..+\.(v_proj|down_proj|w2)\.weight")


def resolve_weights(dtype: str | torch.dtype | None) -> torch.dtype | str | None:
    """What a user asks weights to be: the dtype of floats, or a recipe's name. None: as they are.

    Raises:
        ModelError: neither; the message lists both.
    """
    if dtype is None:
        return None
    if str(dtype).lower() in RECIPES:
        return str(dtype).lower()
    try:
        return resolve_dtype(dtype)
    except ModelError as error:
        raise ModelError(f"{error}, or, quantised, {', '.join(RECIPES)}") from error


def large_matrices(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """The matrices among ``shapes`` but for routers, which are small and decide much."""
    family = FAMILIES.get(config.model_type)
    router = family.experts.saved_router if family and family.experts else None
    return [name for name, shape in shapes.items() if len(shape) == 2 and not (router and name.endswith(router))]


def matrix_formats(config: ModelConfig, shapes: dict[str, tuple[int, ...]], recipe: str) -> dict[str, str]:
    """The format of every matrix among ``shapes``; norms, biases and routers, which stay floats, are not in it.

    As in llama.cpp the head, or the embeddings that it shares, is q6_k (q8_0 with q8_0 or where 256 does not divide
    the columns); in q4_k_m half of v_proj and down_proj are q6_k.

    Raises:
        ModelError: the recipe is not known, or a matrix's columns are no whole number of blocks.
    """
    if recipe not in RECIPES:
        raise ModelError(f"unknown type {recipe!r}; use one of {', '.join(RECIPES)}")
    head = EMBEDDINGS if config.tie_word_embeddings else HEAD
    formats: dict[str, str] = {}
    instead: Counter[str] = Counter()
    for name in large_matrices(config, shapes):
        wanted = RECIPES[recipe]
        is_wide = recipe == "q4_k_m" and _has_more_bits(name, config.num_hidden_layers)
        if is_wide or (name == head and wanted != "q8_0"):
            wanted = "q6_k"
        formats[name] = _that_divides(name, wanted, shapes[name][1])
        if formats[name] != wanted and name != head:
            instead[f"{formats[name]} instead of {wanted}"] += 1
    for what, count in instead.items():
        logger.warning("%d matrices are in %s, whose blocks of 256 do not divide their columns", count, what)
    return formats


def _has_more_bits(name: str, layers: int) -> bool:
    """v_proj and down_proj of the first and last eighth of the layers and of every third between, as in llama.cpp."""
    found = _WIDE.fullmatch(name)
    layer = int(found[1]) if found else 0
    return found is not None and (layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2)


def _that_divides(name: str, format: str, columns: int) -> str:
    if columns % BLOCK_FORMATS[format].block_columns:
        format = _INSTEAD.get(format, format)
    if columns % (size := BLOCK_FORMATS[format].block_columns):
        raise ModelError(f"{name} has {columns} columns, no multiple of {size} as {format} needs; load it with bf16")
    return format
