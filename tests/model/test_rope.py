"""Rotary tables against transformers' own embedding, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from skipkernels.model.rope import rope_tables

_FACTORS = [1.0 + 0.25 * pair for pair in range(8)]
ROPES: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": _FACTORS,
        "long_factor": [2.0 * factor for factor in _FACTORS],
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def config_with(rope: dict[str, object]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        num_hidden_layers=1,
        vocab_size=16,
        max_position_embeddings=256,
        rope_parameters={"rope_theta": 10_000.0} | rope,
    )


@pytest.mark.parametrize("positions", [48, 200])  # within and beyond the 64 of the scaling rules
@pytest.mark.parametrize("rope", ROPES)
def test_tables_are_those_of_transformers(rope: str, positions: int) -> None:
    config = config_with(ROPES[rope])
    ((cos, sin),) = rope_tables(config, positions)
    expected = LlamaRotaryEmbedding(config)(torch.empty(1), torch.arange(positions)[None])
    for own, theirs in zip((cos, sin), expected, strict=True):
        assert torch.equal(own, theirs[0, :, :8])


def test_frequencies_of_a_cast_module_are_its_own() -> None:
    module = LlamaForCausalLM(config_with(ROPES["default"])).half()
    ((cos, _),) = rope_tables(module.config, 200, module)
    expected, _ = module.model.rotary_emb(torch.empty(1), torch.arange(200)[None])
    assert torch.equal(cos, expected[0, :, :8])
    ((unlike, _),) = rope_tables(module.config, 200)
    assert not torch.equal(cos, unlike)


def test_modelling_code_is_not_imported() -> None:
    """It takes three seconds of every start."""
    code = (
        "import sys; from skipkernels import Engine; from skipkernels.demo import demo_model_path;"
        "Engine.from_pretrained(demo_model_path()); assert 'transformers.modeling_utils' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
