"""A multimodal checkpoint's text decoder, wherever its tensors lie: what transformers' whole model answers to text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from skipkernels import Engine
from skipkernels.errors import ModelError
from tests.models import FAMILIES, random_prompt, randomise, stock_tokens, tiny_config

WEIGHTS = "model.safetensors"
PROMPT = random_prompt(21)  # longer than the window
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module")
def module() -> Any:
    text = tiny_config("gemma3_text").to_dict()
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return randomise(Gemma3ForConditionalGeneration(config)).eval()


@pytest.mark.parametrize(
    ("decoder", "head"),
    [
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
        ("model.text_model.", "lm_head."),
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_text_is_decoded_as_by_the_whole_model(
    module: Any, tmp_path: Path, decoder: str, head: str, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    module.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    moved = {name.replace("language_model.model.", decoder): value for name, value in tensors.items()}
    assert f"{decoder}layers.6.mlp.down_proj.weight" in moved
    expected = stock_tokens(module, PROMPT, 64)
    if not tied:
        moved[f"{head}weight"] = moved[f"{decoder}embed_tokens.weight"].flip(0).contiguous()
    save_file(moved, tmp_path / WEIGHTS, metadata={"format": "pt"})
    (answer,) = Engine.from_pretrained(tmp_path, num_threads=1).generate([PROMPT], max_new_tokens=64, eos_token_ids=[])
    assert (answer.token_ids == expected) == tied
    assert "left out 34 tensors, such as " in caplog.text


def test_another_tensor_of_the_decoder_is_refused(module: Any, tmp_path: Path) -> None:
    module.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "language_model.model.layers.0.mlp.down_proj.bias"
    save_file({**tensors, name: torch.zeros(40)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"tensor '{name}' means nothing to this model"):
        Engine.from_pretrained(tmp_path)


def test_a_loaded_module_s_decoder_is_taken(module: Any) -> None:
    expected = stock_tokens(module, PROMPT, 64)
    assert len(set(expected)) > 4
    engine = Engine.from_pretrained(module, num_threads=1)
    assert engine.generate([PROMPT], max_new_tokens=64, eos_token_ids=[])[0].token_ids == expected
    assert engine.config.model_type in FAMILIES
