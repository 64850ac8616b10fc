"""Checkpoints as GPTQ's, AWQ's and fp8's tools write them, by slow loops after the public descriptions of the formats,
and what their words stand for, read back by other loops."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring outputs lies in each four bits of a word, the lowest first."""
MATRICES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
Tensors = dict[str, torch.Tensor]


def is_matrix(name: str) -> bool:
    """Whether the tools quantise a parameter by default: the linear layers of the decoder, not its head."""
    return name.split(".")[-2] in MATRICES and name.endswith(".weight")


def matrices(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The layers that the tools quantise, and their weights."""
    for name, parameter in module.named_parameters():
        if is_matrix(name):
            yield name.removesuffix(".weight"), parameter.detach()


def groups_of(columns: int, group_size: int) -> np.ndarray:
    return np.arange(columns) // (columns if group_size == -1 else group_size)


def rounded(
    weight: torch.Tensor, bits: int, symmetric: bool, groups: np.ndarray, scale_dtype: torch.dtype = torch.float16
) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Levels [rows, columns], scales [rows, groups] and zeros [rows, groups], by rounding to the nearest level."""
    values, top = weight.detach().float().numpy(), 2**bits - 1
    rows, count = len(values), int(groups.max()) + 1
    scales, zeros = np.zeros((rows, count), np.float32), np.zeros((rows, count), np.int64)
    levels = np.zeros(values.shape, np.int64)
    for group in range(count):
        part = values[:, groups == group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high = np.maximum(-low, high)
            low = -high
        scale = np.maximum((high - low) / top, 1e-8)
        scales[:, group] = torch.from_numpy(scale).to(scale_dtype).float().numpy()
        middle = np.full(rows, 2 ** (bits - 1))
        zeros[:, group] = middle if symmetric else np.clip(np.round(-low / scales[:, group]), 1, top)
        rounded_part = np.round(part / scales[:, [group]]) + zeros[:, [group]]
        levels[:, groups == group] = np.clip(rounded_part, 0, top)
    return levels, torch.from_numpy(scales).to(scale_dtype), zeros


def packed_words(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Numbers [n, m] -> i32 [n, m / per word]: neighbours of a row in one word, in ``order`` from the lowest bits."""
    per_word = 32 // bits
    words = np.zeros((len(numbers), numbers.shape[1] // per_word), np.uint32)
    for row in range(len(numbers)):
        for word in range(words.shape[1]):
            for place, which in enumerate(order or range(per_word)):
                value = int(numbers[row, word * per_word + which]) & (2**bits - 1)
                words[row, word] |= np.uint32(value << (bits * place))
    return torch.from_numpy(words.view(np.int32))


def number_at(words: torch.Tensor, bits: int, row: int, index: int, order: tuple[int, ...] | None = None) -> int:
    """One of the numbers that ``packed_words`` packed."""
    per_word = 32 // bits
    places = list(order or range(per_word))
    word = int(words[row, index // per_word]) & 0xFFFFFFFF
    return word >> (bits * places.index(index % per_word)) & (2**bits - 1)


def gptq_tensors(
    layer: str, weight: torch.Tensor, bits: int, symmetric: bool, groups: np.ndarray, *, v1: bool = True, **options: Any
) -> Tensors:
    levels, scales, zeros = rounded(weight, bits, symmetric, groups, **options)
    return {
        f"{layer}.qweight": packed_words(levels, bits).T.contiguous(),
        f"{layer}.qzeros": packed_words((zeros - (1 if v1 else 0)).T, bits),
        f"{layer}.scales": scales.T.contiguous(),
        f"{layer}.g_idx": torch.from_numpy(groups.astype(np.int32)),
    }


def gptq_values(tensors: Mapping[str, torch.Tensor], layer: str, bits: int, *, v1: bool = True) -> torch.Tensor:
    """What the tensors of a layer stand for, f32 [rows, columns], a number at a time."""
    words, zeros = tensors[f"{layer}.qweight"].T.contiguous(), tensors[f"{layer}.qzeros"]
    scales, groups = tensors[f"{layer}.scales"], tensors[f"{layer}.g_idx"].tolist()
    out = torch.empty(len(words), len(groups))
    for row in range(len(words)):
        for column, group in enumerate(groups):
            zero = number_at(zeros, bits, group, row) + (1 if v1 else 0)
            out[row, column] = float(scales[group, row]) * (number_at(words, bits, row, column) - zero)
    return out


def awq_tensors(layer: str, weight: torch.Tensor, groups: np.ndarray) -> Tensors:
    levels, scales, zeros = rounded(weight, 4, False, groups)
    return {
        f"{layer}.qweight": packed_words(levels.T, 4, AWQ_ORDER),
        f"{layer}.qzeros": packed_words(zeros.T, 4, AWQ_ORDER),
        f"{layer}.scales": scales.T.contiguous(),
    }


def awq_values(tensors: Mapping[str, torch.Tensor], layer: str) -> torch.Tensor:
    words, zeros, scales = (tensors[f"{layer}.{name}"] for name in ("qweight", "qzeros", "scales"))
    columns, rows = len(words), scales.shape[1]
    out = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            group = column * len(scales) // columns
            zero = number_at(zeros, 4, group, row, AWQ_ORDER)
            out[row, column] = float(scales[group, row]) * (number_at(words, 4, column, row, AWQ_ORDER) - zero)
    return out


def save_packed(folder: Path, module: Any, tensors: Tensors, settings: dict[str, Any]) -> Path:
    """``module`` with the tensors in place of the weights of their layers."""
    module.save_pretrained(folder)
    layers = {name.rpartition(".")[0] for name in tensors}
    floats = {
        name: value
        for name, value in load_file(folder / "model.safetensors").items()
        if not (name.endswith(".weight") and name.removesuffix(".weight") in layers)
    }
    save_file(floats | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=settings)
    return folder


ALL = 1 << 20
"""Rows or columns of a tile: all there are."""


def fp8_settings(tile: list[int] | None, **others: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": tile, **others}


def fp8_tensors(layer: str, weight: torch.Tensor, tile: tuple[int, int], name: str) -> Tensors:
    """One scale a tile, so that its largest value is 448, the largest of fp8."""
    rows, columns = -(-weight.shape[0] // tile[0]), -(-weight.shape[1] // tile[1])
    numbers, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            part = slice(row * tile[0], (row + 1) * tile[0]), slice(column * tile[1], (column + 1) * tile[1])
            scales[row, column] = weight[part].abs().max().float() / 448
            numbers[part] = (weight[part].float() / scales[row, column]).to(torch.float8_e4m3fn)
    return {f"{layer}.weight": numbers, f"{layer}.{name}": scales}


def save_fp8(
    folder: Path, module: Any, tile: tuple[int, int], name: str, told: list[int] | None, **others: Any
) -> Tensors:
    tensors: Tensors = {}
    for layer, weight in matrices(module):
        rows, columns = min(tile[0], len(weight)), min(tile[1], weight.shape[1])
        tensors |= fp8_tensors(layer, weight, (rows, columns), name)
    save_packed(folder, module, tensors, fp8_settings(told, **others))
    return tensors


def edit_tensors(folder: Path, **changed: torch.Tensor | None) -> None:
    """Changes or (None) removes tensors of the first layer's o_proj."""
    path, layer = folder / "model.safetensors", "model.layers.0.self_attn.o_proj"
    tensors = load_file(path)
    for name, tensor in changed.items():
        tensors.pop(f"{layer}.{name}", None)
        if tensor is not None:
            tensors[f"{layer}.{name}"] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
