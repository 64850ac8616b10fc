"""Random programs whose matrices are blocks, as GPU kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from skipkernels.model.matrix import BLOCK_FORMATS, Matrix, StackedMatrix
from skipkernels.model.weights import ModelWeights, into_planes
from skipkernels.program import Program, build_program
from skipkernels.program.program import Variant
from skipkernels.program.state import LAYOUTS, DecodeState
from skipkernels.skipping.policy import DensePolicy
from tests.executors.programs import Case
from tests.matrices import random_matrix


@dataclass(frozen=True)
class BlockCase(Case):
    """A case with matrices in ``formats``: v_proj, lm_head and, where ``up_differs``, up_proj in the second, all others
    in the first."""

    formats: tuple[str, str] = ("q4_0", "q4_0")
    up_differs: bool = True

    @classmethod
    def of(cls, format: str, other: str = "", **changes: Any) -> BlockCase:
        """Every matrix has as many columns as the formats' blocks, or a few times that."""
        other = other or format
        columns = max(BLOCK_FORMATS[each].block_columns for each in (format, other))
        values: dict[str, Any] = {
            "seq_lens": (5,),
            "active": (True,) * len(changes.get("seq_lens", (5,))),
            "hidden_size": -(-96 // columns) * columns,
            "intermediate_size": -(-160 // columns) * columns,
            "vocab_size": 37,
            "head_dim": max(16, columns // 4),
            "num_key_value_heads": 2,
            "group_size": 2,
            "dtype": torch.bfloat16,
            "policies": (DensePolicy(),),
            "seed": 7,
            "num_layers": 1,
            "layout": LAYOUTS["cuda"],
            "formats": (format, other),
        }
        return cls(**{**values, **changes})

    def weights(self, *, arrange: bool = True) -> ModelWeights:
        weights, config, seeds = super().weights(), self.config(), iter(range(self.seed, self.seed + 1000))
        format, other = self.formats

        def blocks(kind: str, rows: int, columns: int) -> Matrix:
            size = {"q8_0": 127, "q6_k": 32 * 127, "q4_k": 15 * 63, "q5_k": 31 * 63, "f8_e4m3": 128}.get(kind, 16)
            return random_matrix(kind, rows, columns, seed=next(seeds), scale=1 / (size * columns**0.5))

        of_up = other if self.up_differs else format
        kv = config.num_key_value_heads * config.head_dim
        for layer in weights.layers:
            hidden, inner = self.hidden_size, self.intermediate_size
            q, k, v = (blocks(format, config.attention_size, hidden), *(blocks(f, kv, hidden) for f in (format, other)))
            layer.qkv_proj = StackedMatrix((q, k, v))
            layer.o_proj = blocks(format, hidden, config.attention_size)
            layer.gate_up_proj = StackedMatrix((blocks(format, inner, hidden), blocks(of_up, inner, hidden)))
            layer.down_proj = blocks(format, hidden, inner)
        weights.embed_tokens = blocks(format, self.vocab_size, self.hidden_size)
        weights.lm_head = blocks(other, self.vocab_size, self.hidden_size)
        weights.cache_dtype = self.dtype
        if arrange:
            into_planes(weights)
        return weights

    def program(self, weights: ModelWeights, state: DecodeState) -> Program:
        variant = Variant.for_plans(policy.plan(self.num_layers) for policy in self.policies)
        return build_program(self.config(), weights, state, gated=variant.gated, activations="fp32")
