"""StackedExperts: the parameters of gpt-oss's checkpoints, whose files stack a layer's experts, in floats or MXFP4.

A stack lies transposed, [experts, in, out], with gate and up in alternate columns. In MXFP4 (arXiv 2310.10537) rows are
outputs, as ours: 32 numbers of 4 bits (one of sign, two of exponent, one of fraction) in 16 bytes of ``_blocks``, the
first in the lower half, and their power of two in ``_scales``. bf16 holds every such weight exactly.
"""

from __future__ import annotations

import re

import torch

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig
from skipkernels.model.float_parameters import FloatParameters
from skipkernels.model.matrix import FLOAT_FORMATS
from skipkernels.model.shards import ExpectedTensor, Shards
from skipkernels.model.weights import expected_parameters

_NUMBERS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_LEVELS = torch.cat((_NUMBERS, -_NUMBERS))
_COLUMNS = 32
"""That share a scale."""
_FORMATS = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
assert set(_FORMATS.values()) == FLOAT_FORMATS.keys()
_EXPERT = re.compile(r"(.+\.experts\.)(\d+)\.(gate|up|down)_proj\.(weight|bias)")


def dequantized_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """u8 [rows, blocks, 16] and u8 [rows, blocks] -> bf16 [rows, 32 blocks]."""
    halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    return torch.ldexp(_LEVELS[halves.long()], scales.int()[..., None] - 127).flatten(-2).bfloat16()


class StackedExperts(FloatParameters):
    """What lies in ``shards``, each expert's matrices under names of their own (``weights.saved_views``).

    Raises:
        ModelError: a tensor is missing, of another shape or dtype than expected, or of unknown meaning. Reads headers.
    """

    def __init__(self, shards: Shards, config: ModelConfig) -> None:
        super().__init__(str(shards.path), config, self._of_name)
        self._shards = shards
        self._headers = shards.headers()
        self._stacks: dict[str, torch.Tensor] = {}  # the newest: all experts of one are read before the next
        floats = expected_parameters(config)
        packed = {name: floats.pop(name) for name in list(floats) if f"{name}_blocks" in self._headers}
        expected: dict[str, ExpectedTensor] = {}
        for name, (experts, columns, rows) in packed.items():
            if columns % _COLUMNS:
                raise ModelError(
                    f"{self.source}: {name!r} has {columns} inputs, no multiple of {_COLUMNS} as MXFP4 needs"
                )
            shape = (experts, rows, columns // _COLUMNS)
            expected[f"{name}_blocks"] = ExpectedTensor(("U8",), (*shape, _COLUMNS // 2))
            expected[f"{name}_scales"] = ExpectedTensor(("U8",), shape)
        shards.check(floats, config.num_hidden_layers, expected)

    def format(self, name: str) -> str:
        stack = self._stack_of(name)
        return "mxfp4" if f"{stack}_blocks" in self._headers else _FORMATS[self._headers[stack].dtype]

    def _stack_of(self, name: str) -> str:
        """The tensor in the files that holds a parameter."""
        if (found := _EXPERT.fullmatch(name)) is None:
            return name
        stack = found[1] + ("down_proj" if found[3] == "down" else "gate_up_proj")
        return stack if found[4] == "weight" else f"{stack}_bias"

    def _of_name(self, name: str) -> torch.Tensor:
        if (found := _EXPERT.fullmatch(name)) is None:
            return self._shards.tensor(name)
        stack, expert = self._stack_of(name), int(found[2])
        rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[found[3]]
        if f"{stack}_blocks" in self._headers:
            blocks, scales = (self._tensor(f"{stack}_{part}")[expert, rows] for part in ("blocks", "scales"))
            return dequantized_mxfp4(blocks, scales)
        own = self._tensor(stack)[expert]
        return own[rows] if found[4] == "bias" else own[:, rows].T

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._stacks:
            if len(self._stacks) > 1:
                self._stacks.clear()
            self._stacks[name] = self._shards.tensor(name)
        return self._stacks[name]
