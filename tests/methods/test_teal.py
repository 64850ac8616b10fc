"""TEAL on the FFN: a literal rendering on Hugging Face's module gives the same predictions."""

import numpy as np
import pytest
import torch

from skipkernels.calibration.passages import Passage
from skipkernels.methods.method import Found
from skipkernels.methods.setup import Setup
from skipkernels.methods.teal import TealSkip
from tests.methods.conftest import LAYERS
from tests.models import random_prompt, tiny_module

PASSAGE = Passage(tuple(random_prompt(30, seed=5)), 8)


@torch.inference_mode()
def literal(thresholds: list[list[float]]) -> tuple[torch.Tensor, float]:
    """Predictions past the prompt, and the share of FFN bytes not read of the tokens generated there."""
    module = tiny_module(num_hidden_layers=LAYERS)
    unread = []

    def hook(layer: int):
        def forward(mlp, inputs, output):
            ffn, down = thresholds[layer]
            x = inputs[0].clone()
            dropped = x[0, 8:].abs() < ffn
            x[0, 8:][dropped] = 0
            products = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
            small = products[0, 8:].abs() < down
            products[0, 8:][small] = 0
            unread.append(float(2 * dropped.float().mean() + small.float().mean()) / 3)
            return mlp.down_proj(products)

        return forward

    for index, layer in enumerate(module.model.layers):
        layer.mlp.register_forward_hook(hook(index))
    logits = module(torch.tensor([PASSAGE.token_ids[:-1]])).logits[0, 7:]
    return logits.argmax(-1), float(np.mean(unread))


def test_columns_are_left_out_as_a_literal_rendering_does(setup: Setup) -> None:
    found: Found = {"thresholds": [[0.3, 0.2 + layer / 20] for layer in range(LAYERS)]}
    (reading,) = TealSkip().build(setup, found).score([PASSAGE])
    tokens, unread = literal(found["thresholds"])
    assert reading.argmax.tolist() == tokens.tolist()
    assert reading.work.ffn_skip_ratio == pytest.approx(unread * 21 / 22, rel=1e-5)  # the first of 22 runs in full
