"""gpt-oss's checkpoints: stacks of experts as transformers lays them out, in floats and in MXFP4."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from skipkernels import Engine, NeuronPolicy
from skipkernels.errors import ModelError, PolicyError
from skipkernels.model.matrix import Matrix
from skipkernels.model.weights import parameter_views
from tests.models import random_prompt, stock_tokens, tiny_module

SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96, "num_hidden_layers": 2}
PROMPT = random_prompt(21)


def mxfp4_folder(path: Path) -> Any:
    """A checkpoint with random blocks, and the module that transformers' own reading of them gives."""
    module = tiny_module("gpt_oss", **SIZES, dtype=torch.bfloat16)
    module.save_pretrained(path)
    file, generator = path / "model.safetensors", torch.Generator().manual_seed(0)
    tensors, parameters = load_file(file), dict(module.named_parameters())
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        parameters[name].data = convert_moe_packed_tensors(blocks.clone(), scales.clone())
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return module


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path, caplog: Any) -> None:
    module = mxfp4_folder(tmp_path)
    engine = Engine.from_pretrained(tmp_path, num_threads=1)
    assert engine.dtype == "bf16"
    assert "no CPU kernels read MXFP4; 30 matrices are dequantised to bf16" in caplog.text
    exact = {name: parameter.clone() for name, parameter in module.named_parameters()}
    for name, view in parameter_views(engine.config, engine.weights).items():
        assert torch.equal(view.reshape(exact[name].shape), exact[name].to(view.dtype)), name
    floats = Engine.from_pretrained(tmp_path, dtype="fp32", num_threads=1)
    assert floats.fingerprint == engine.fingerprint == Engine.from_pretrained(module).fingerprint
    (answer,) = floats.generate([PROMPT], max_new_tokens=64, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(module.float(), PROMPT, 64)
    assert len(set(answer.token_ids)) > 4


def test_a_module_decodes_on_and_is_read_again_only_when_it_changes(tmp_path: Path) -> None:
    """Its stack of gates and ups is copied, since they lie in alternate columns there; what it answers stays."""
    module = tiny_module("gpt_oss", **SIZES)
    expected = stock_tokens(module, PROMPT, 12)
    engine = Engine.from_pretrained(module, num_threads=1)
    assert engine.generate([PROMPT], max_new_tokens=12, eos_token_ids=[])[0].token_ids == expected
    assert stock_tokens(module, PROMPT, 12) == expected
    module.save_pretrained(tmp_path)
    again = Engine.from_pretrained(tmp_path, num_threads=1)
    assert again.fingerprint == engine.fingerprint
    assert again.generate([PROMPT], max_new_tokens=12, eos_token_ids=[])[0].token_ids == expected


def test_single_neurons_are_left_out_of_what_mxfp4_becomes(tmp_path: Path) -> None:
    """The transposed experts hold the same values; only as blocks they cannot be left out."""
    mxfp4_folder(tmp_path)
    assert Engine.no_neurons_of(tmp_path) is None
    neurons = NeuronPolicy(product_thresholds=(0.05, 0.1), warmup_tokens=0)
    engine, plain = Engine.from_pretrained(tmp_path, policy=neurons), Engine.from_pretrained(tmp_path)
    views = [parameter_views(each.config, each.weights) for each in (engine, plain)]
    assert all(torch.equal(view, views[1][name]) for name, view in views[0].items())
    assert 0.02 < engine.generate([PROMPT], max_new_tokens=8, eos_token_ids=[])[0].unread_ratio < 0.34
    assert "single neurons of experts in q8_0 cannot" in str(Engine.no_neurons_of(tmp_path, "q8_0"))
    with pytest.raises(PolicyError, match="single neurons of experts in q8_0 cannot be left out"):
        Engine.from_pretrained(tmp_path, dtype="q8_0", policy=neurons)


def test_experts_are_quantised_while_read(tmp_path: Path) -> None:
    module = mxfp4_folder(tmp_path)
    for model in (tmp_path, module):
        native, reference = (
            Engine.from_pretrained(model, dtype="q8_0", executor=kind, num_threads=2) for kind in ("cpu", "reference")
        )
        matrix = native.weights.layers[1].gate_up_proj
        assert isinstance(matrix, Matrix)
        assert matrix.format == "q8_0"
        tokens = [
            engine.generate([PROMPT], max_new_tokens=2, eos_token_ids=[])[0].token_ids for engine in (native, reference)
        ]
        assert tokens[0] == tokens[1]


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"swiglu_limit=5.0 are not supported; the kernels have 1.702 and 7.0"):
        Engine.from_pretrained(tiny_module("gpt_oss", swiglu_limit=5.0))
    module = tiny_module("gpt_oss")
    module.model.layers[1].mlp.experts.alpha = 1.0
    with pytest.raises(ModelError, match=r"layers.1.mlp.experts' has alpha=1.0, its configuration says 1.702"):
        Engine.from_pretrained(module)
    mxfp4_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file(tensors | {name: tensors[name][:, 1:].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"down_proj_scales' has shape \(5, 63, 3\), expected \(5, 64, 3\)"):
        Engine.from_pretrained(tmp_path)
