"""Quantising while a checkpoint is read: which format each matrix gets, what its blocks hold, what is refused."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from skipkernels import Engine
from skipkernels.errors import ModelError
from skipkernels.model.block_quantizer import WRITABLE_FORMATS, quantize
from skipkernels.model.config import ModelConfig
from skipkernels.model.recipe import matrix_formats
from skipkernels.model.weights import expected_parameters, parameter_views
from tests.gguf_files import write_gguf
from tests.models import random_prompt, tiny_module

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
PROMPT = random_prompt(9)
ERRORS = {"q8_0": 0.006, "q6_k": 0.019, "q5_1": 0.039, "q5_0": 0.045, "q4_k": 0.075, "q4_1": 0.081, "q4_0": 0.091}
"""Root mean square error of normal values over their own, with some room; llama.cpp's own quantisers leave 0.0183 in
q6_k and 0.0731 in q4_k on values like these."""


def values(rows: int = 24, columns: int = 1024) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(rows, columns, generator=generator) * 0.02
    drawn[1, :256] = 0.0
    drawn[2, :256] = -0.5
    drawn[3, :256] = drawn[3, :256].abs()
    return drawn


@pytest.mark.parametrize("format", WRITABLE_FORMATS)
def test_the_error_is_the_format_s(format: str) -> None:
    drawn = values()
    found = torch.from_numpy(gguf.dequantize(quantize(drawn, format).data.numpy(), Type[format.upper()]))
    ordinary = drawn[4:]
    error = (found[4:] - ordinary).square().mean().sqrt() / ordinary.square().mean().sqrt()
    assert error < ERRORS[format]
    assert not found[1, :256].any()
    torch.testing.assert_close(found[2, :256], drawn[2, :256], rtol=0.002, atol=0)
    assert (found[3, :256] - drawn[3, :256]).abs().max() < 0.01


@pytest.mark.parametrize("format", WRITABLE_FORMATS)
def test_pieces_are_quantised_alone(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = values()
    whole = quantize(drawn, format).data
    monkeypatch.setattr("skipkernels.model.block_quantizer._CHUNK", 5 * 1024)
    assert torch.equal(quantize(drawn, format).data, whole)
    assert torch.equal(quantize(drawn[7:8], format).data, whole[7:8])


def test_values_that_no_block_holds() -> None:
    drawn = values()
    drawn[5, 5] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinite"):
        quantize(drawn, "q4_0")
    with pytest.raises(ModelError, match="'q5_k' cannot be written; these formats can: q8_0, "):
        quantize(values(), "q5_k")


def test_formats_are_llama_cpp_s_choice() -> None:
    module = tiny_module("llama", **{**WIDE, "num_hidden_layers": 8}, tie_word_embeddings=False)
    config = ModelConfig.from_hf(module.config)
    formats = matrix_formats(config, expected_parameters(config), "q4_k_m")
    wide = {int(name.split(".")[2]) for name, format in formats.items() if "down_proj" in name and format == "q6_k"}
    assert wide == {0, 3, 6, 7}  # of 8: the first and last eighth, and every third between
    assert wide == {int(name.split(".")[2]) for name, of in formats.items() if "v_proj" in name and of == "q6_k"}
    assert formats["lm_head.weight"] == "q6_k"
    assert formats["model.embed_tokens.weight"] == formats["model.layers.0.self_attn.q_proj.weight"] == "q4_k"
    assert not any("norm" in name for name in formats)
    assert set(matrix_formats(config, expected_parameters(config), "q8_0").values()) == {"q8_0"}


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_is_what_a_file_of_its_blocks_is(tmp_path: Path, tied: bool) -> None:
    """From the folder, from the module and from a file that the package wrote: the same bytes and tokens."""
    module = tiny_module("llama", **WIDE, tie_word_embeddings=tied)
    module.save_pretrained(tmp_path / "folder")
    path = write_gguf(tmp_path / "model.gguf", module, Type.Q4_0)
    file = Engine.from_pretrained(path, executor="reference")
    for model in (tmp_path / "folder", tiny_module("llama", **WIDE, tie_word_embeddings=tied)):
        engine = Engine.from_pretrained(model, dtype="q4_0", executor="reference")
        assert engine.dtype == "q4_0+q6_k"
        for (name, own), (_, other) in zip(engine.weights.tensors(), file.weights.tensors(), strict=True):
            if not isinstance(own, torch.Tensor) and name not in ("lm_head", "embed_tokens"):
                assert torch.equal(own.dequantize(), other.dequantize()), name  # type: ignore[union-attr]
        assert engine.fingerprint == Engine.from_pretrained(model).fingerprint
        (answer,) = engine.generate([PROMPT], max_new_tokens=8, eos_token_ids=[])
        assert len(answer.token_ids) == 8


def test_the_kernels_decode_it_as_the_reference_does(tmp_path: Path) -> None:
    module = tiny_module("qwen2", **WIDE)
    for recipe in ("q4_k_m", "q5_1"):
        engines = [Engine.from_pretrained(module, dtype=recipe, executor=kind) for kind in ("auto", "reference")]
        logits = [engine.generate([PROMPT], max_new_tokens=1, eos_token_ids=[])[0].token_ids for engine in engines]
        assert logits[0] == logits[1]


def test_columns_that_blocks_do_not_divide(tmp_path: Path, caplog: Any) -> None:
    with pytest.raises(ModelError, match=r"embed_tokens.weight has 40 columns, no multiple of 32 as q4_0 needs"):
        Engine.from_pretrained(tiny_module("llama", hidden_size=40), dtype="q4_0")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    engine = Engine.from_pretrained(tiny_module("llama", **sizes), dtype="q4_k_m", executor="reference")
    assert "in q5_0 instead of q4_k, whose blocks of 256 do not divide their columns" in caplog.text
    assert engine.dtype == "q4_k+q5_0+q6_k+q8_0"


def test_a_second_rounding_is_announced_and_none_is_not(tmp_path: Path, caplog: Any) -> None:
    module = tiny_module("llama", **WIDE, tie_word_embeddings=True)
    path = write_gguf(tmp_path / "model.gguf", module, Type.Q8_0)
    same = Engine.from_pretrained(path, dtype="Q8_0", executor="reference")
    assert "second time" not in caplog.text
    own = Engine.from_pretrained(path, executor="reference")
    assert torch.equal(same.weights.layers[0].o_proj.data, own.weights.layers[0].o_proj.data)  # type: ignore[union-attr]
    Engine.from_pretrained(path, dtype="q4_0", executor="reference")
    assert "14 matrices were quantised before and are rounded a second time, from q8_0 to q4_0" in caplog.text
    floats = write_gguf(tmp_path / "floats.gguf", module, Type.F16)
    caplog.clear()
    assert Engine.from_pretrained(floats, dtype="q8_0").dtype == "q8_0"
    assert "second time" not in caplog.text


def test_what_dtype_may_be() -> None:
    with pytest.raises(ModelError, match="unknown dtype 'q2_k'; use one of fp32, bf16, fp16, or, quantised, q8_0, "):
        Engine.from_pretrained(tiny_module("llama"), dtype="q2_k")


def test_those_who_need_floats_say_what_to_do() -> None:
    engine = Engine.from_pretrained(tiny_module("llama", **WIDE), dtype="q8_0")
    with pytest.raises(ModelError, match=r"floats are needed here, got a matrix in q8_0; .*--dtype bf16"):
        parameter_views(engine.config, engine.weights)
