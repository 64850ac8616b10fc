"""GgufTensors: the tensors of a GGUF file under Hugging Face's names, in the format of the file or as floats."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType, dequantize, get_tensor_name_map

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig
from skipkernels.model.gguf_config import ROPE_FACTORS
from skipkernels.model.gguf_file import GgufFile, GgufTensor
from skipkernels.model.matrix import FLOAT_FORMATS, Matrix

_PERMUTED = ("llama",)
"""Architectures whose q and k rows llama.cpp stores in the order of its own rotary embedding."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
"""In Hugging Face's names; a file stacks all experts of a layer in one tensor."""
_CHUNK = 1 << 22
"""Weights dequantised at a time: 16 MB of floats."""


class GgufTensors:
    """Hugging Face's parameters of ``config`` in ``file``.

    Raises:
        ModelError: a tensor is missing, has another shape or a type that cannot be read, or one is there whose meaning
            is not known. Reads headers only.
    """

    def __init__(self, file: GgufFile, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.file, self.source = file, str(file.path)
        architecture = str(file.metadata["general.architecture"])
        self._names = _names(file, architecture, config.num_hidden_layers, shapes)
        self._heads = permuted_heads(architecture, config)
        self._refuse_unknown()
        for own, shape in self._whole_shapes(config, shapes).items():
            self._check(file.tensors[own], shape)

    def format(self, name: str) -> str:
        """The format of a parameter: one of ``BLOCK_FORMATS`` or ``FLOAT_FORMATS``, or another of GGUF's types."""
        return self._placed(name).type.name.lower()

    def blocks(self, name: str) -> Matrix:
        """A matrix in the file's own blocks, mapped where its rows stand in order."""
        tensor = self._placed(name)
        rows, columns = tensor.shape
        data = tensor.bytes().view(rows, -1)
        if (order := self._row_order(name, rows)) is not None:
            data = data[order]
        return Matrix(tensor.type.name.lower(), rows, columns, data)

    def copy_floats(self, name: str, target: torch.Tensor) -> None:
        """Dequantises a parameter into ``target``, of its shape and any float dtype."""
        tensor = self._placed(name)
        order = self._row_order(name, tensor.shape[0])
        for start, part in _floats(tensor):
            if len(tensor.shape) == 1:
                target.copy_(part[0] if order is None else part[0, order])
            elif order is None:
                target[start : start + len(part)].copy_(part)
            else:
                target[torch.argsort(order)[start : start + len(part)].to(target.device)] = part.to(target)

    def rope_factors(self) -> torch.Tensor | None:
        """By what each rotary frequency is divided [head_dim / 2], fp32 (Llama 3's scaling); None: by nothing."""
        tensor = self.file.tensors.get(ROPE_FACTORS)
        return None if tensor is None else torch.cat([part.flatten() for _, part in _floats(tensor)])

    def contents(self) -> str:
        return self.file.contents()

    def _placed(self, name: str) -> GgufTensor:
        tensor, expert = self.file.tensors[self._names[name]], expert_of(name)
        return tensor if expert is None else tensor.part(expert)

    def _whole_shapes(self, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shape of each of the file's tensors."""
        return {
            self._names[name]: shape if expert_of(name) is None else (config.num_experts, *shape)
            for name, shape in shapes.items()
        }

    def _row_order(self, name: str, rows: int) -> torch.Tensor | None:
        """Which of the file's rows stand in each of Hugging Face's: halves of a head, where llama.cpp has pairs."""
        heads = self._heads.get(name.split(".")[-2])
        return None if heads is None else halves_from_pairs(rows, heads)

    def _check(self, tensor: GgufTensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise ModelError(
                f"{tensor.path}: tensor {tensor.name!r} has shape {tensor.shape}, its metadata asks for {shape}"
            )
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[tensor.type][1]), np.uint8), tensor.type)
        except NotImplementedError as error:
            raise ModelError(
                f"{tensor.path}: tensor {tensor.name!r} is of type {tensor.type.name}, which cannot be dequantised"
            ) from error

    def _refuse_unknown(self) -> None:
        known = {*self._names.values(), ROPE_FACTORS}
        unknown = sorted(set(self.file.tensors) - known)
        if unknown:
            raise ModelError(
                f"{self.file.path}: {len(unknown)} tensors, such as {unknown[0]!r}, mean nothing to this model; "
                "leaving them out would change it"
            )


def permuted_heads(architecture: str, config: ModelConfig) -> dict[str, int]:
    """The projections whose rows a file holds in llama.cpp's order, and their heads."""
    if architecture not in _PERMUTED:
        return {}
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}


def halves_from_pairs(rows: int, heads: int) -> torch.Tensor:
    """Which of a file's rows stand in each of Hugging Face's [rows]; its argsort is the way back."""
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def expert_of(name: str) -> int | None:
    """The number of the expert that a parameter belongs to."""
    found = _EXPERT.search(name)
    return int(found[1]) if found else None


def gguf_names(architecture: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """Hugging Face's names -> the file's, of experts that of their stack; those that the architecture has not are left
    out."""
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture)
    mapping = get_tensor_name_map(arch, layers)
    stacks = {name: _EXPERT.sub(".experts.", name) for name in names}
    found = {name: mapping.get_name(stack, try_suffixes=(".weight", ".bias")) for name, stack in stacks.items()}
    return {name: own for name, own in found.items() if own is not None}


def _names(file: GgufFile, architecture: str, layers: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    names = gguf_names(architecture, layers, shapes)
    for name in shapes:
        if (found := names.get(name)) not in file.tensors:
            raise ModelError(f"{file.path}: tensor {found or name!r} is missing from the file")
    return names


def _floats(tensor: GgufTensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Number of the first row, and rows as fp32 [rows, columns], in pieces."""
    columns = tensor.shape[-1]
    rows = tensor.nbytes and int(np.prod(tensor.shape[:-1]))
    data = tensor.bytes().view(max(rows, 1), -1)
    step = max(1, _CHUNK // columns)
    for start in range(0, len(data), step):
        yield start, float_rows(data[start : start + step], tensor.type)


def float_rows(data: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """Bytes of rows [rows, bytes] -> their weights, f32 [rows, columns]."""
    if (dtype := FLOAT_FORMATS.get(kind.name.lower())) is not None:
        return data.contiguous().view(dtype).float()
    return torch.from_numpy(dequantize(data.numpy(), kind))
