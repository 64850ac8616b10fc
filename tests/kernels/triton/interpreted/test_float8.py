"""fp8 checkpoints through the Triton kernels that multiply matrices."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipkernels.executors.reference import ReferenceExecutor
from skipkernels.kernels.triton import TRITON
from tests.executors.float8_checkpoint import as_floats, float8_checkpoint
from tests.executors.gpu_engines import load_as_for_a_gpu
from tests.kernels.triton.interpreted.test_blocks import MATRIX_OPS
from tests.models import random_prompt, tiny_engine

PROMPTS = [random_prompt(3, 1), random_prompt(1, 2)]


class MatricesByTriton(ReferenceExecutor):
    def run_instruction(self, index: int) -> None:
        ins = self.program[index]
        if ins.op in MATRIX_OPS:
            TRITON[ins.op](ins)
        else:
            super().run_instruction(index)


def test_tokens_are_those_of_the_reference_on_floats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, options = float8_checkpoint(tmp_path, "tiles", num_hidden_layers=1), {"max_batch_size": 2}
    expected = as_floats(folder, PROMPTS, 3, **options)
    load_as_for_a_gpu(monkeypatch, MatricesByTriton)
    engine = tiny_engine(module=folder, **options)
    assert engine.dtype == "f8_e4m3+fp32"
    assert engine.weights.layers[0].down_proj.layout == "planes"
    for ours, theirs in zip(engine.generate(PROMPTS, max_new_tokens=3), expected, strict=True):
        assert ours.token_ids == theirs.token_ids
