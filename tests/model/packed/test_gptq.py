"""GPTQ checkpoints: what their words stand for, which of our formats holds it, what is dequantised, what refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from skipkernels import Engine
from skipkernels.errors import ModelError
from skipkernels.model.matrix import dequantized, formats_of
from skipkernels.model.packed.gptq import Gptq
from skipkernels.model.weights import parameter_views
from tests.models import random_prompt, stock_tokens, tiny_module
from tests.packed_checkpoints import (
    edit_config,
    edit_tensors,
    gptq_tensors,
    gptq_values,
    groups_of,
    is_matrix,
    matrices,
    packed_words,
    save_packed,
)

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
PROMPT = random_prompt(9)
GRIDS = [
    # bits, symmetric, group size, first version, format
    (4, True, 32, True, "q4_0"),
    (4, True, -1, False, "q4_0"),
    (4, False, 32, True, "q5_0"),
    (4, False, 64, False, "q5_0"),
    (8, True, 32, True, "q8_0"),
    (8, True, -1, False, "q8_0"),
]


def settings(
    bits: int = 4, symmetric: bool = True, group_size: int = 32, v1: bool = True, **others: Any
) -> dict[str, Any]:
    version = "gptq" if v1 else "gptq_v2"
    told = {"quant_method": "gptq", "bits": bits, "sym": symmetric, "group_size": group_size, "desc_act": False}
    return {**told, "checkpoint_format": version, **others}


def save(
    folder: Path,
    module: Any,
    bits: int = 4,
    symmetric: bool = True,
    group_size: int = 32,
    v1: bool = True,
    **others: Any,
) -> dict[str, torch.Tensor]:
    """A checkpoint whose matrices, but for the head, are quantised; returns the tensors of those."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, weight in matrices(module):
        groups = groups_of(weight.shape[1], group_size)
        tensors |= gptq_tensors(layer, weight, bits, symmetric, groups, v1=v1)
    save_packed(folder, module, tensors, settings(bits, symmetric, group_size, v1, **others))
    return tensors


@pytest.mark.parametrize(("bits", "symmetric", "group_size", "v1", "format"), GRIDS)
def test_every_value_is_the_checkpoint_s(
    tmp_path: Path, caplog: Any, bits: int, symmetric: bool, group_size: int, v1: bool, format: str
) -> None:
    """Bit for bit, in blocks and as fp32; tokens are transformers' on the same values."""
    module = tiny_module("llama", **SIZES).half()
    tensors = save(tmp_path, module, bits, symmetric, group_size, v1)
    own, floats = Engine.from_pretrained(tmp_path), Engine.from_pretrained(tmp_path, dtype="fp32")
    assert own.dtype == f"fp16+{format}"
    assert "dequantised" not in caplog.text
    assert "rounded" not in caplog.text
    views = parameter_views(floats.config, floats.weights)
    reference = tiny_module("llama", **SIZES)
    reference.load_state_dict(module.float().state_dict())
    with torch.no_grad():
        for layer, _ in matrices(module):
            values = gptq_values(tensors, layer, bits, v1=v1)
            assert torch.equal(views[f"{layer}.weight"], values), layer
            reference.get_parameter(f"{layer}.weight").copy_(values)
    for index, layer in enumerate(own.weights.layers):
        down = f"model.layers.{index}.mlp.down_proj.weight"
        assert torch.equal(dequantized(layer.down_proj), views[down])
        assert set(formats_of(layer.qkv_proj)) == {format}
        assert torch.equal(dequantized(layer.gate_up_proj), dequantized(floats.weights.layers[index].gate_up_proj))
    (answer,) = floats.generate([PROMPT], max_new_tokens=24, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(reference, PROMPT, 24)
    assert own.fingerprint == floats.fingerprint


def test_blocks_decode_as_the_reference_does(tmp_path: Path) -> None:
    save(tmp_path, tiny_module("llama", **SIZES).half(), symmetric=False)
    answers = [
        Engine.from_pretrained(tmp_path, executor=kind).generate([PROMPT], max_new_tokens=12, eos_token_ids=[])[0]
        for kind in ("cpu", "reference")
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_minima_that_fp16_holds_lie_in_q4_1(tmp_path: Path) -> None:
    """Scales of few bits: their products with zeros are exact, and five bits a weight do."""
    module = tiny_module("llama", **SIZES).half()
    tensors: dict[str, torch.Tensor] = {}
    for layer, weight in matrices(module):
        tensors |= gptq_tensors(layer, weight, 4, False, groups_of(weight.shape[1], 32))
        scales = tensors[f"{layer}.scales"]
        tensors[f"{layer}.scales"] = torch.exp2(torch.log2(scales.float()).round()).half()
    save_packed(tmp_path, module, tensors, settings(symmetric=False))
    engine = Engine.from_pretrained(tmp_path)
    assert engine.dtype == "fp16+q4_1"
    values = gptq_values(tensors, "model.layers.1.mlp.down_proj", 4)
    assert torch.equal(dequantized(engine.weights.layers[1].down_proj), values)


def test_act_order_is_dequantised_and_said_so(tmp_path: Path, caplog: Any) -> None:
    module = tiny_module("llama", **SIZES).half()
    tensors: dict[str, torch.Tensor] = {}
    for layer, weight in matrices(module):
        groups = np.random.default_rng(0).permutation(groups_of(weight.shape[1], 32))
        tensors |= gptq_tensors(layer, weight, 4, True, groups)
    save_packed(tmp_path, module, tensors, settings(desc_act=True))
    engine = Engine.from_pretrained(tmp_path)
    assert engine.dtype == "fp16"
    said = "no CPU kernels read INT4 IN ACT-ORDER; 14 matrices are dequantised to fp16, 11 significant bits of each"
    assert said in caplog.text
    values = gptq_values(tensors, "model.layers.0.mlp.up_proj", 4)
    assert torch.equal(engine.weights.layers[0].gate_up_proj[96:], values.half())  # type: ignore[index]
    exact = Engine.from_pretrained(tmp_path, dtype="fp32")
    assert torch.equal(exact.weights.layers[0].gate_up_proj[96:], values)  # type: ignore[index]


def test_act_order_over_whole_blocks_is_none(tmp_path: Path) -> None:
    """Groups in another order, each of its own 32 neighbours: blocks hold them."""
    module = tiny_module("llama", **SIZES).half()
    tensors: dict[str, torch.Tensor] = {}
    for layer, weight in matrices(module):
        groups = groups_of(weight.shape[1], 32)
        tensors |= gptq_tensors(layer, weight, 4, True, groups.max() - groups)
    save_packed(tmp_path, module, tensors, settings(desc_act=True))
    engine = Engine.from_pretrained(tmp_path)
    assert engine.dtype == "fp16+q4_0"
    values = gptq_values(tensors, "model.layers.1.mlp.down_proj", 4)
    assert torch.equal(dequantized(engine.weights.layers[1].down_proj), values)


@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size", "what"),
    [(8, False, 32, "INT8 WITH A ZERO POINT"), (4, True, 16, "INT4 IN GROUPS THAT CUT BLOCKS OF 32")],
)
def test_what_no_block_holds_is_dequantised(
    tmp_path: Path, caplog: Any, bits: int, symmetric: bool, group_size: int, what: str
) -> None:
    tensors = save(tmp_path, tiny_module("llama", **SIZES).half(), bits, symmetric, group_size)
    engine = Engine.from_pretrained(tmp_path)
    assert f"no CPU kernels read {what}; 14 matrices are dequantised to fp16" in caplog.text
    values = gptq_values(tensors, "model.layers.0.mlp.down_proj", bits)
    assert torch.equal(engine.weights.layers[0].down_proj, values.half())  # type: ignore[arg-type]


def test_a_zero_of_sixteen_is_the_first_version_s_largest(tmp_path: Path) -> None:
    """Stored less 1 in four bits, 16 is 15: it is not wrapped to 0."""
    module = tiny_module("llama", **SIZES).half()
    tensors = save(tmp_path, module, symmetric=False)
    layer = "model.layers.0.self_attn.o_proj"
    edit_tensors(tmp_path, qzeros=torch.full_like(tensors[f"{layer}.qzeros"], -1))
    tensors[f"{layer}.qzeros"].fill_(-1)
    engine = Engine.from_pretrained(tmp_path)
    assert formats_of(engine.weights.layers[0].o_proj) == ("q4_1",)  # 16 scales are as exact as one
    values = gptq_values(tensors, layer, 4)
    assert torch.equal(dequantized(engine.weights.layers[0].o_proj), values)
    assert values.max() <= 0


def test_layers_left_as_floats_biases_and_a_packed_head(tmp_path: Path, caplog: Any) -> None:
    """Qwen2's q, k and v have biases that count, one layer is not quantised, and the head is."""
    module = tiny_module("qwen2", **SIZES).half()
    save(tmp_path, module)
    path = tmp_path / "model.safetensors"
    tensors, second = load_file(path), "model.layers.1."
    for name in [name for name in tensors if name.startswith(second) and is_matrix(name.replace("qweight", "weight"))]:
        layer = name.removesuffix(".qweight")
        for own in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{layer}.{own}"]
        tensors[f"{layer}.weight"] = module.get_parameter(f"{layer}.weight").detach()
    head = tensors.pop("lm_head.weight")
    padded = torch.cat([head, head[:5]])  # words hold eight rows each
    tensors |= gptq_tensors("lm_head", padded, 4, True, groups_of(64, 32))
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], padded[-5:]])
    save_file(tensors, path, metadata={"format": "pt"})
    edit_config(tmp_path, vocab_size=264)
    engine = Engine.from_pretrained(tmp_path, dtype="fp32")
    own = Engine.from_pretrained(tmp_path)
    assert own.dtype == "fp16+q4_0"
    assert formats_of(own.weights.lm_head) == ("q4_0",)
    assert formats_of(own.weights.layers[1].qkv_proj) == ("f16",)
    reference = tiny_module("qwen2", **SIZES, vocab_size=264)
    state = {name: value.float() for name, value in module.state_dict().items()}
    state |= {f"{layer}.weight": gptq_values(tensors, layer, 4) for layer in layers_of(tensors)}
    state["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    reference.load_state_dict(state)
    (answer,) = engine.generate([PROMPT], max_new_tokens=24, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(reference, PROMPT, 24)
    assert "dequantised" not in caplog.text


def layers_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    save(tmp_path, tiny_module("llama", **SIZES, tie_word_embeddings=True).half())
    engine = Engine.from_pretrained(tmp_path)
    assert engine.weights.lm_head is engine.weights.embed_tokens


def test_a_packed_head_beside_tied_embeddings_counts(tmp_path: Path, caplog: Any) -> None:
    module = tiny_module("llama", **SIZES, tie_word_embeddings=True, vocab_size=264).half()
    save(tmp_path, module)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = gptq_tensors("lm_head", -module.model.embed_tokens.weight.detach(), 4, True, groups_of(64, 32))
    save_file(tensors | head, path, metadata={"format": "pt"})
    engine = Engine.from_pretrained(tmp_path)
    assert formats_of(engine.weights.lm_head) == ("q4_0",)
    assert torch.equal(dequantized(engine.weights.lm_head), gptq_values(head, "lm_head", 4))
    assert "config.json says that the head is tied" in caplog.text


def test_biases_of_zeros_are_old_tools(tmp_path: Path) -> None:
    save(tmp_path, tiny_module("llama", **SIZES).half())
    expected = Engine.from_pretrained(tmp_path).generate([PROMPT], max_new_tokens=8, eos_token_ids=[])[0].token_ids
    edit_tensors(tmp_path, bias=torch.zeros(64))
    answer = Engine.from_pretrained(tmp_path).generate([PROMPT], max_new_tokens=8, eos_token_ids=[])[0]
    assert answer.token_ids == expected
    edit_tensors(tmp_path, bias=torch.ones(64))
    with pytest.raises(ModelError, match=r"'model.layers.0.self_attn.o_proj.bias' is no zero"):
        Engine.from_pretrained(tmp_path)


def test_single_layers_may_have_settings_of_their_own(tmp_path: Path) -> None:
    """gptqmodel's ``dynamic``."""
    module = tiny_module("llama", **SIZES).half()
    tensors = save(tmp_path, module)
    path = tmp_path / "model.safetensors"
    eight: dict[str, torch.Tensor] = {}
    for layer, weight in matrices(module):
        if "down_proj" in layer:
            eight |= gptq_tensors(layer, weight, 8, True, groups_of(weight.shape[1], 32))
    save_file(load_file(path) | eight, path, metadata={"format": "pt"})
    own = {r"+:.*\.down_proj": {"bits": 8}, r"-:lm_head": {}}
    edit_config(tmp_path, quantization_config=settings(dynamic=own))
    layer = Engine.from_pretrained(tmp_path).weights.layers[1]
    assert formats_of(layer.down_proj) == ("q8_0",)
    assert torch.equal(dequantized(layer.down_proj), gptq_values(eight, "model.layers.1.mlp.down_proj", 8))
    assert torch.equal(dequantized(layer.o_proj), gptq_values(tensors, "model.layers.1.self_attn.o_proj", 4))


def test_another_type_takes_equal_blocks_as_they_are(tmp_path: Path, caplog: Any) -> None:
    save(tmp_path, tiny_module("llama", **SIZES).half())
    own = Engine.from_pretrained(tmp_path).weights.layers[0]
    same = Engine.from_pretrained(tmp_path, dtype="q4_0").weights.layers[0]
    assert torch.equal(dequantized(own.down_proj), dequantized(same.down_proj))
    assert "second time" not in caplog.text
    Engine.from_pretrained(tmp_path, dtype="q8_0")
    assert "14 matrices were quantised before and are rounded a second time, from q4_0 to q8_0" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_dtypes(tmp_path: Path, caplog: Any, dtype: torch.dtype) -> None:
    """Those of bf16 fit fp16; those of fp32 are rounded, which is said."""
    module = tiny_module("llama", **SIZES, dtype=torch.bfloat16)
    tensors: dict[str, torch.Tensor] = {}
    for layer, weight in matrices(module):
        tensors |= gptq_tensors(layer, weight, 4, True, groups_of(weight.shape[1], 32), scale_dtype=dtype)
    save_packed(tmp_path, module, tensors, settings())
    engine = Engine.from_pretrained(tmp_path)
    assert engine.dtype == "bf16+q4_0"
    values, found = gptq_values(tensors, "model.layers.0.mlp.down_proj", 4), engine.weights.layers[0].down_proj
    said = "scales are rounded to fp16, which moves a weight by at most 1/2048 of it" in caplog.text
    assert said == (dtype is torch.float32)
    if dtype is torch.bfloat16:
        assert torch.equal(dequantized(found), values)
    else:
        assert ((dequantized(found) - values).abs() <= values.abs() / 2048).all()
        assert not torch.equal(dequantized(found), values)


def test_scales_beyond_fp16_are_dequantised(tmp_path: Path, caplog: Any) -> None:
    module = tiny_module("llama", **SIZES).half()
    tensors = save(tmp_path, module)
    scales = tensors["model.layers.0.self_attn.o_proj.scales"].float()
    edit_tensors(tmp_path, scales=scales * 1e-7)
    Engine.from_pretrained(tmp_path)
    assert "no CPU kernels read INT4 WITH SCALES BEYOND FP16; 1 matrices are dequantised to fp16" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 2}, "quantised by gptq with 2 bits, which is not read; supported: 4 and 8 bits"),
        ({"bits": 3}, "with 3 bits, which is not read"),
        ({"bits": None}, "bits must be a whole number, got None"),
        ({"bits": "4"}, "bits must be a whole number, got '4'"),
        ({"bits": 8}, r"qweight' has shape \(8, 64\), expected \(16, 64\)"),
        ({"group_size": 64}, r"qzeros' has shape \(2, 8\), expected \(1, 8\)"),
        ({"group_size": 0}, "group_size must be at least 1, or -1 for whole rows, got 0"),
        ({"group_size": None}, "group_size must be a whole number"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin', which is not read"),
        ({"is_marlin_format": True}, "checkpoint_format 'marlin', which is not read"),
        ({"checkpoint_format": "bitblas"}, "checkpoint_format 'bitblas', which is not read"),
        ({"checkpoint_format": "gptq_v2"}, "says sym, so that zeros are 8, and checkpoint_format gptq_v2"),
        ({"dynamic": {"+:(": {"bits": 8}}}, "dynamic cannot be used"),
        ({"dynamic": {"+:.*q_proj": {"bits": 3}}}, "with 3 bits, which is not read"),
        ({"quant_method": "bitsandbytes"}, r"quantised by bitsandbytes, which is not read; supported: gptq "),
        ({"quant_method": None}, "quantised by an unknown method"),
        ({"quant_method": "awq"}, r"g_idx' means nothing to this model"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    save(tmp_path, tiny_module("llama", **SIZES).half())
    edit_config(tmp_path, quantization_config=settings(**{}) | changed)
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scales": None}, "tensor 'model.layers.0.self_attn.o_proj.scales' is missing"),
        ({"qweight": None}, "tensor 'model.layers.0.self_attn.o_proj.qweight' is missing"),
        ({"qzeros": None}, "o_proj.qzeros' is missing"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"o_proj.g_idx' has shape \(63,\), expected \(64,\)"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, r"o_proj: g_idx must hold groups 0..1, got 2"),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, r"o_proj: g_idx must hold groups 0..1, got -1"),
        ({"g_idx": torch.zeros(64)}, "o_proj.g_idx' has dtype F32, expected one of I32"),
        ({"qweight": torch.zeros(8, 64)}, "o_proj.qweight' has dtype F32, expected one of I32"),
        ({"scales": torch.full((2, 64), float("nan"))}, "o_proj: its scales hold NaN or infinite values"),
        ({"scales": torch.zeros(2, 63)}, r"o_proj.scales' has shape \(2, 63\), expected \(2, 64\)"),
        ({"weight": torch.zeros(64, 64)}, "o_proj.weight' means nothing to this model"),
        ({"input_scale": torch.ones(1)}, "o_proj.input_scale' means nothing to this model"),
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    save(tmp_path, tiny_module("llama", **SIZES).half())
    edit_tensors(tmp_path, **changed)
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(tmp_path)


def test_act_order_needs_the_order(tmp_path: Path) -> None:
    save(tmp_path, tiny_module("llama", **SIZES).half(), desc_act=True)
    edit_tensors(tmp_path, g_idx=None)
    with pytest.raises(ModelError, match=r"o_proj.g_idx' is missing"):
        Engine.from_pretrained(tmp_path)


def test_experts_are_refused(tmp_path: Path) -> None:
    module = tiny_module("qwen3_moe").half()
    module.save_pretrained(tmp_path)
    edit_config(tmp_path, quantization_config=settings())
    with pytest.raises(ModelError, match="qwen3_moe has experts, which are not read from packed checkpoints"):
        Engine.from_pretrained(tmp_path)


def test_words_are_packed_as_described() -> None:
    """The loops of the tests themselves, on numbers written down: 1..8 in four bits are 0x87654321."""
    words = packed_words(np.arange(1, 9)[None], 4)
    assert int(words[0, 0]) & 0xFFFFFFFF == 0x87654321
    assert Gptq(settings()).notes == ()
