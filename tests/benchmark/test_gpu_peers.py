"""The peers of a GPU, run on the CPU: the same tokens, without the graph."""

import torch

from skipkernels.benchmark.gpu_peers import CompiledSystem, TorchGraphSystem
from skipkernels.model.config import ModelConfig
from tests.models import random_prompt, stock_tokens, tiny_module


def test_the_torch_loop_decodes_what_generate_does() -> None:
    module, prompt = tiny_module(), random_prompt(9)
    system = TorchGraphSystem(module, ModelConfig.from_hf(module.config), 2, prompt)
    for _ in range(2):  # the second time over the same cache
        token = system.prefill(9)
        tokens = [token.clone()]
        for _ in range(7):
            system.step()
            tokens.append(token.clone())
        expected = stock_tokens(module, prompt, 8)
        assert torch.cat(tokens, dim=1).tolist() == [expected, expected]


def test_both_peers_time_every_token_past_the_first() -> None:
    module = tiny_module()
    for kind in (TorchGraphSystem, CompiledSystem):
        measured = kind(module, ModelConfig.from_hf(module.config), 1, random_prompt(9)).decode(9, 5)
        assert len(measured.seconds) == 4
        assert measured.bytes_per_step > 0
