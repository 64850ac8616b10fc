"""compressed-tensors checkpoints, made and read back by the package itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from skipkernels import Engine
from skipkernels.errors import ModelError
from skipkernels.model.matrix import dequantized, formats_of
from skipkernels.model.weights import parameter_views
from tests.models import random_prompt, stock_tokens, tiny_module
from tests.packed_checkpoints import edit_config, edit_tensors, matrices, save_packed
from tests.tolerances import assert_close

pytest.importorskip("compressed_tensors", reason="the oracle is the package itself: pip install compressed-tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
PROMPT = random_prompt(9)
DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
Tensors = dict[str, torch.Tensor]


def group(format: str, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    told = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    return {"targets": ["Linear"], "weights": told, "input_activations": inputs, "format": format}


INT4 = group("pack-quantized")
FLOAT8: dict[str, Any] = {"num_bits": 8, "type": "float", "group_size": None}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "w4a16": (INT4, "q4_0"),
    "w4a16, groups of 64": (group("pack-quantized", group_size=64), "q4_0"),
    "w4a16, rows": (group("pack-quantized", strategy="channel", group_size=None), "q4_0"),
    "w4a16, asymmetric": (group("pack-quantized", symmetric=False), "q4_1+q5_0"),
    "w4a16, asymmetric rows": (
        group("pack-quantized", symmetric=False, strategy="channel", group_size=None),
        "q4_1+q5_0",
    ),
    "w8a16": (group("pack-quantized", num_bits=8), "q8_0"),
    "w8a16, rows": (group("pack-quantized", num_bits=8, strategy="channel", group_size=None), "q8_0"),
    "w8a8": (
        group("int-quantized", DYNAMIC | {"type": "int"}, num_bits=8, strategy="channel", group_size=None),
        "q8_0",
    ),
    "w8a16, one scale": (group("naive-quantized", num_bits=8, strategy="tensor", group_size=None), "q8_0"),
    "w8a16, asymmetric": (group("pack-quantized", num_bits=8, symmetric=False), ""),
    "fp8, rows": (group("float-quantized", DYNAMIC | {"type": "float"}, **FLOAT8, strategy="channel"), ""),
    "fp8, one scale": (group("naive-quantized", **FLOAT8, strategy="tensor"), ""),
    "fp8, blocks": (
        group("float-quantized", DYNAMIC | {"type": "float"}, **FLOAT8, strategy="block", block_structure=[32, 64]),
        "",
    ),
}


def scheme_of(kind: dict[str, Any]) -> QuantizationScheme:
    return QuantizationScheme.model_validate(kind)


def compressed(weight: torch.Tensor, kind: dict[str, Any], dtype: torch.dtype) -> Tensors:
    """A layer's tensors, by the package: scales that span the values, in ``dtype``."""
    scheme, values = scheme_of(kind), weight.to(dtype)
    args = scheme.weights
    if args.strategy == "group":
        parts = values.unflatten(1, (-1, args.group_size))
        low, high = parts.amin(-1), parts.amax(-1)
    elif args.strategy == "channel":
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    elif args.strategy == "block":
        tiles = values.unflatten(0, (-1, args.block_structure[0])).unflatten(2, (-1, args.block_structure[1]))
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    else:
        low, high = values.min()[None], values.max()[None]
    scale, zero = calculate_qparams(low, high, args)
    state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
    return compressor(kind).compress(state, scheme)


def decompressed(tensors: Tensors, layer: str, kind: dict[str, Any]) -> torch.Tensor:
    """What the package makes of a layer's tensors, f32."""
    own = {name.removeprefix(f"{layer}."): value for name, value in tensors.items() if name.startswith(f"{layer}.")}
    own["weight_scale"] = own["weight_scale"].float()  # in which it multiplies, too
    return compressor(kind).decompress(own, scheme_of(kind))["weight"]


def compressor(kind: dict[str, Any]) -> Any:
    return BaseCompressor.get_value_from_registry(kind["format"])


def save(
    folder: Path, module: Any, kind: dict[str, Any], dtype: torch.dtype = torch.bfloat16, **others: Any
) -> Tensors:
    tensors: Tensors = {}
    for layer, weight in matrices(module):
        tensors |= {f"{layer}.{name}": value for name, value in compressed(weight, kind, dtype).items()}
    save_packed(folder, module, tensors, settings({"group_0": kind}, **others))
    return tensors


def settings(groups: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": groups,
        "format": next(iter(groups.values()))["format"],
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        **others,
    }


@pytest.mark.parametrize("what", KINDS)
def test_every_value_is_the_package_s(tmp_path: Path, caplog: Any, what: str) -> None:
    """Bit for bit, in blocks and as fp32; what is dequantised, or not rounded as the checkpoint asks, is said."""
    kind, format = KINDS[what]
    tensors = save(tmp_path, tiny_module("llama", **SIZES, dtype=torch.bfloat16), kind)
    own = Engine.from_pretrained(tmp_path)
    said = caplog.text
    floats = Engine.from_pretrained(tmp_path, dtype="fp32")
    views = parameter_views(floats.config, floats.weights)
    for layer, _ in matrices(tiny_module("llama", **SIZES)):
        assert torch.equal(views[f"{layer}.weight"], decompressed(tensors, layer, kind)), layer
    for quantised, exact in zip(own.weights.layers, floats.weights.layers, strict=True):
        for matrix in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            found, values = getattr(quantised, matrix), dequantized(getattr(exact, matrix))
            assert {*formats_of(found)} <= {*(format or "bf16").split("+")}
            assert torch.equal(dequantized(found), values if format else values.bfloat16().float())
    name = "F8_E4M3" if "fp8" in what else "INT8 WITH A ZERO POINT"
    dequantises = f"no CPU kernels read {name}; 14 matrices are dequantised to bf16, 8 significant bits of each weight"
    assert (dequantises in said) == (not format)
    assert ("config.json asks for activations in " in said) == (kind["input_activations"] is not None)
    assert own.fingerprint == floats.fingerprint


@pytest.mark.parametrize("what", ["w4a16", "w8a16, rows", "fp8, one scale"])
def test_logits_are_transformers(tmp_path: Path, what: str) -> None:
    """transformers reads the same folder, by way of the package (but for packed zero points: 5.23 expects others)."""
    kind, _ = KINDS[what]
    save(tmp_path, tiny_module("llama", **SIZES), kind, torch.float32)
    engine = Engine.from_pretrained(tmp_path, dtype="fp32")
    module = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    (answer,) = engine.generate([PROMPT], max_new_tokens=24, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(module, PROMPT, 24)
    tokens = [*PROMPT, *answer.token_ids]
    with torch.inference_mode():
        expected = module(torch.tensor([tokens])).logits[0]
    assert_close(engine_logits(engine, tokens), expected, "logits after layers, fp32")


def engine_logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocab], by transformers' module with the engine's weights in place of its own."""
    module = tiny_module("llama", **SIZES)
    views = parameter_views(engine.config, engine.weights)
    module.load_state_dict({name: view.clone() for name, view in views.items()})
    with torch.inference_mode():
        return module(torch.tensor([tokens])).logits[0]


def test_several_schemes(tmp_path: Path) -> None:
    """A name counts for more than a pattern, and that for more than a class; one layer is left out."""
    module = tiny_module("llama", **SIZES, dtype=torch.bfloat16)
    down, name = "re:.*down_proj$", "model.layers.1.mlp.down_proj"
    groups = {
        "group_0": INT4,
        "group_1": {**KINDS["w8a16"][0], "targets": [down]},
        "group_2": {**KINDS["fp8, one scale"][0], "targets": [name]},
    }
    left = "model.layers.0.self_attn.o_proj"
    tensors: Tensors = {}
    for layer, weight in matrices(module):
        which = "group_2" if layer == name else "group_1" if "down_proj" in layer else "group_0"
        if layer != left:
            own = compressed(weight, groups[which], torch.bfloat16)
            tensors |= {f"{layer}.{key}": value for key, value in own.items()}
    save_packed(tmp_path, module, tensors, settings(groups, format="mixed-precision", ignore=["lm_head", left]))
    first, second = Engine.from_pretrained(tmp_path).weights.layers
    assert formats_of(first.down_proj) == ("q8_0",)
    assert formats_of(second.down_proj) == ("bf16",)
    assert formats_of(second.o_proj) == ("q4_0",)
    assert torch.equal(first.o_proj, module.get_parameter(f"{left}.weight"))  # type: ignore[arg-type]
    values = decompressed(tensors, name, groups["group_2"])
    assert torch.equal(second.down_proj, values.bfloat16())  # type: ignore[arg-type]
    assert torch.equal(
        dequantized(first.down_proj), decompressed(tensors, "model.layers.0.mlp.down_proj", groups["group_1"])
    )


def test_act_order_by_groups(tmp_path: Path, caplog: Any) -> None:
    """weight_g_idx, of older versions: the columns' groups in any order."""
    module = tiny_module("llama", **SIZES, dtype=torch.bfloat16)
    tensors = save(tmp_path, module, INT4)
    layer = "model.layers.0.self_attn.o_proj"
    order = torch.arange(64).flip(0) % 2
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {f"{layer}.weight_g_idx": order.int()}, path, metadata={"format": "pt"})
    matrix = Engine.from_pretrained(tmp_path).weights.layers[0].o_proj
    assert "no CPU kernels read INT4 IN ACT-ORDER; 1 matrices are dequantised to bf16" in caplog.text
    scales = tensors[f"{layer}.weight_scale"].float()
    plain = decompressed(tensors, layer, INT4)
    levels = plain / scales.repeat_interleave(32, 1)
    assert torch.equal(matrix, (levels.round() * scales[:, order]).bfloat16())  # type: ignore[arg-type]


def test_checkpoints_of_older_releases_call_themselves_frozen(tmp_path: Path) -> None:
    tensors = save(tmp_path, tiny_module("llama", **SIZES, dtype=torch.bfloat16), INT4, quantization_status="frozen")
    layer = "model.layers.0.self_attn.o_proj"
    matrix = Engine.from_pretrained(tmp_path, dtype="fp32").weights.layers[0].o_proj
    assert torch.equal(dequantized(matrix), decompressed(tensors, layer, INT4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme, which is not read"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config, which is not read"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity of format 'sparse-24-bitmask'"),
        ({"quantization_status": "calibration"}, "quantization_status 'calibration'"),
        ({"config_groups": {}}, "config_groups must hold schemes"),
        ({"config_groups": {"group_0": None}}, "config_groups must hold schemes"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    save(tmp_path, tiny_module("llama", **SIZES, dtype=torch.bfloat16), INT4, **changed)
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (group("marlin-24"), "format 'marlin-24', which is not read; supported: formats pack-quantized"),
        (group("nvfp4-pack-quantized", type="float"), "format 'nvfp4-pack-quantized'"),
        (group("pack-quantized", num_bits=3), "weights of type int and 3 bits in format pack-quantized"),
        (group("pack-quantized", type="float"), "weights of type float and 4 bits"),
        (group("pack-quantized", {"num_bits": 4, "type": "int"}), "activations of 4 bits, which is not read"),
        (group("pack-quantized", strategy="block"), "weights of type int by block"),
        (group("pack-quantized", group_size=48), "group_size 48 does not divide its 64 columns"),
        (group("pack-quantized", group_size=16), r"weight_scale' has shape \(64, 2\), expected \(64, 4\)"),
        (group("pack-quantized", num_bits=8), r"weight_packed' has shape \(64, 8\), expected \(64, 16\)"),
        (group("pack-quantized", strategy="channel", group_size=None), r"shape \(64, 2\), expected \(64, 1\)"),
        ({**INT4, "targets": ["re:("]}, r"target 're:\(' is no pattern"),
        ({**INT4, "targets": ["re:.*nothing"]}, "no target of quantization_config's config_groups covers it"),
        ({**INT4, "targets": None}, "has targets None"),
        ({**INT4, "output_activations": {"num_bits": 8}}, "output_activations, which is not read"),
    ],
)
def test_schemes_that_cannot_be(tmp_path: Path, kind: dict[str, Any], message: str) -> None:
    save(tmp_path, tiny_module("llama", **SIZES, dtype=torch.bfloat16), INT4)
    edit_config(tmp_path, quantization_config=settings({"group_0": kind}))
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_scale", None, "weight_scale' is missing"),
        ("weight_packed", None, "weight_packed' is missing"),
        ("weight_shape", torch.tensor([64, 32]), r"weight_shape holds \[64, 32\], expected \[64, 64\]"),
        ("weight_shape", torch.tensor([64]), r"weight_shape' has shape \(1,\), expected \(2,\)"),
        ("weight_g_idx", torch.full((64,), 9, dtype=torch.int32), "weight_g_idx must hold groups 0..1, got 9"),
        ("weight_zero_point", torch.zeros(3, 2, dtype=torch.int32), r"shape \(3, 2\), expected \(8, 2\)"),
        ("weight_scale", torch.full((64, 2), float("inf")), "its scales hold NaN or infinite values"),
        ("k_scale", torch.ones(1), "k_scale' means nothing to this model"),
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, name: str, value: torch.Tensor | None, message: str) -> None:
    save(tmp_path, tiny_module("llama", **SIZES, dtype=torch.bfloat16), INT4)
    edit_tensors(tmp_path, **{name: value})
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(tmp_path)
