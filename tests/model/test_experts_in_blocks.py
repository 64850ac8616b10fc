"""Experts in blocks: of GGUF files and quantised while a checkpoint is read, one stack of each layer's experts."""

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from skipkernels import Engine, NeuronPolicy
from skipkernels.errors import ModelError, PolicyError
from skipkernels.model.config import ModelConfig
from skipkernels.model.gguf_file import GgufFile
from skipkernels.model.gguf_writer import write_gguf as write_checkpoint
from skipkernels.model.matrix import Matrix
from skipkernels.model.recipe import matrix_formats
from skipkernels.model.weights import expected_tensors, saved_views
from tests.gguf_files import read_back, write_gguf
from tests.models import random_prompt, stock_tokens, tiny_module

FAMILIES = pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
PROMPT = random_prompt(21)
WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "moe_intermediate_size": 256}


def module_of(family: str, **changes: Any) -> Any:
    """One that GGUF's architecture computes."""
    return tiny_module(family, **({"sliding_window": None} if family == "mixtral" else {}), **changes)


@FAMILIES
def test_architectures_decode_as_transformers(tmp_path: Path, family: str) -> None:
    module = module_of(family)
    engine = Engine.from_pretrained(write_gguf(tmp_path / "model.gguf", module), num_threads=1)
    assert engine.config == ModelConfig.from_hf(module.config)
    (answer,) = engine.generate([PROMPT], max_new_tokens=64, eos_token_ids=[])
    assert answer.token_ids == stock_tokens(module, PROMPT, 64)


@FAMILIES
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_K, Type.Q2_K], ids=lambda kind: kind.name)
def test_tokens_are_those_of_the_weights_dequantised(tmp_path: Path, family: str, kind: Type, caplog: Any) -> None:
    """64 of them, and every weight bit for bit; the router, as in llama.cpp's files, is fp32."""
    module = module_of(family, **WIDE, num_hidden_layers=2)
    path = write_gguf(tmp_path / "model.gguf", module, kind)
    expected = stock_tokens(read_back(path, module), PROMPT, 64)
    floats = Engine.from_pretrained(path, dtype="fp32", num_threads=1)
    (answer,) = floats.generate([PROMPT], max_new_tokens=64, eos_token_ids=[])
    assert answer.token_ids == expected
    own = Engine.from_pretrained(path, executor="reference").weights
    assert own.dtype == torch.bfloat16  # of the cache: that the router is fp32 counts for nothing
    for layer, dequantised in zip(own.layers, floats.weights.layers, strict=True):
        assert torch.equal(layer.router, dequantised.router)  # type: ignore[arg-type]
        for matrix, values in (
            (layer.gate_up_proj, dequantised.gate_up_proj),
            (layer.down_proj, dequantised.down_proj),
        ):
            if kind is Type.Q2_K:
                assert torch.equal(matrix, values.bfloat16())  # type: ignore[arg-type, union-attr]
            else:
                assert isinstance(matrix, Matrix)
                assert matrix.format == kind.name.lower()
                assert torch.equal(matrix.dequantize(), values)  # type: ignore[arg-type]
    assert ("no CPU kernels read Q2_K" in caplog.text) == (kind is Type.Q2_K)
    assert own.fingerprint(floats.config) == floats.fingerprint


@FAMILIES
def test_the_kernels_decode_as_the_reference_does(tmp_path: Path, family: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", module_of(family, **WIDE, num_hidden_layers=2), Type.Q5_1)
    native, reference = (Engine.from_pretrained(path, executor=kind, num_threads=2) for kind in ("cpu", "reference"))
    tokens = [
        engine.generate([PROMPT], max_new_tokens=4, eos_token_ids=[])[0].token_ids for engine in (native, reference)
    ]
    assert tokens[0] == tokens[1]
    assert native.weights.layers[0].gate_up_proj.layout == "interleaved"  # type: ignore[union-attr]
    assert native.weights.layers[0].expert_nbytes() == 3 * 256 * 256 * 24 / 32


@FAMILIES
@pytest.mark.parametrize("recipe", ["q8_0", "q4_k_m"])
def test_a_checkpoint_is_what_a_file_of_its_blocks_is(tmp_path: Path, family: str, recipe: str) -> None:
    """From the folder, from the module and from a file that this project wrote: the same weights."""
    module = module_of(family, **WIDE, dtype=torch.bfloat16)
    module.save_pretrained(tmp_path / "folder")
    write_checkpoint(tmp_path / "folder", recipe, tmp_path / "model.gguf")
    file = Engine.from_pretrained(tmp_path / "model.gguf", executor="reference")
    for model in (tmp_path / "folder", module):
        engine = Engine.from_pretrained(model, dtype=recipe, executor="reference")
        assert engine.weights.layers[0].router.dtype == torch.bfloat16  # type: ignore[union-attr]
        assert engine.config == file.config
        for (name, own), (_, other) in zip(engine.weights.tensors(), file.weights.tensors(), strict=True):
            if isinstance(own, Matrix):
                assert torch.equal(own.data, other.data), name  # type: ignore[union-attr]
                assert own.format == other.format  # type: ignore[union-attr]
            elif isinstance(own, torch.Tensor):
                assert torch.equal(own.float(), other), name  # type: ignore[arg-type]


@FAMILIES
def test_single_neurons_of_experts_in_blocks_are_refused(tmp_path: Path, family: str) -> None:
    """Before and after loading, with what to do; as floats the same file leaves them out."""
    path = write_gguf(tmp_path / "model.gguf", module_of(family, **WIDE, num_hidden_layers=2), Type.Q8_0)
    message = "single neurons of experts in {} cannot be left out; leave out whole FFN blocks, or load the model with"
    neurons = NeuronPolicy(gate_thresholds=(0.1,) * 2, warmup_tokens=0)
    for dtype, blocks in ((None, "q8_0"), ("q4_0", "q4_0")):
        reason = Engine.no_neurons_of(path, dtype)
        assert reason is not None
        assert message.format(blocks) in reason
        with pytest.raises(PolicyError, match=message.format(blocks)):
            Engine.from_pretrained(path, dtype=dtype, neuron_rows=True)
        with pytest.raises(PolicyError, match=message.format(blocks)):
            Engine.from_pretrained(path, dtype=dtype).generate(PROMPT, policy=neurons)
    assert Engine.no_neurons_of(path, "bf16") is None
    engine = Engine.from_pretrained(path, dtype="bf16", policy=neurons)
    assert engine.generate(PROMPT, max_new_tokens=8)[0].unread_ratio > 0.05
    write_gguf(tmp_path / "floats.gguf", module_of(family, num_hidden_layers=2), Type.F16)
    assert Engine.no_neurons_of(tmp_path / "floats.gguf") is None
    assert Engine.from_pretrained(tmp_path / "floats.gguf", policy=neurons).no_neurons is None


def test_gguf_reads_what_is_written(tmp_path: Path) -> None:
    """A stack of all experts in one tensor, in floats too, and the values that a file's own are."""
    module = module_of("qwen3_moe", tie_word_embeddings=True)
    module.save_pretrained(tmp_path / "folder")
    written = write_checkpoint(tmp_path / "folder", "bf16", tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(written.path).tensors}
    assert tensors["blk.1.ffn_down_exps.weight"].shape.tolist() == [24, 40, 6]
    assert tensors["blk.1.ffn_gate_inp.weight"].tensor_type == Type.F32
    again = write_checkpoint(written.path, "fp32", tmp_path / "again.gguf")
    module.bfloat16().float()
    engine = Engine.from_pretrained(again.path, num_threads=1)
    (answer,) = engine.generate([PROMPT], max_new_tokens=16, eos_token_ids=[])
    expected = Engine.from_pretrained(written.path, dtype="fp32", num_threads=1)
    assert answer.token_ids == expected.generate([PROMPT], max_new_tokens=16, eos_token_ids=[])[0].token_ids
    views = saved_views(engine.config, engine.weights)
    values = dict(module.named_parameters())["model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(views["model.layers.1.mlp.experts.5.down_proj.weight"], values[5])


def test_formats_are_llama_cpp_s_choice() -> None:
    """The router is none of them, and down_proj of some layers has more bits."""
    config = ModelConfig.from_hf(module_of("mixtral", **WIDE, num_hidden_layers=8).config)
    formats = matrix_formats(config, expected_tensors(config), "q4_k_m")
    assert not any("block_sparse_moe.gate" in name for name in formats)
    wide = {int(name.split(".")[2]) for name, format in formats.items() if ".w2." in name and format == "q6_k"}
    assert wide == {0, 3, 6, 7}
    assert {format for name, format in formats.items() if ".w1." in name or ".w3." in name} == {"q4_k"}


def test_experts_in_several_formats_become_floats(tmp_path: Path, caplog: Any) -> None:
    module = module_of("qwen3_moe", **WIDE, num_hidden_layers=2)
    path = write_gguf(tmp_path / "model.gguf", module, Type.Q8_0, {"ffn_up_exps": Type.Q4_0})
    engine = Engine.from_pretrained(path, executor="reference")
    assert isinstance(engine.weights.layers[0].gate_up_proj, torch.Tensor)
    assert isinstance(engine.weights.layers[0].down_proj, Matrix)
    assert "12 matrices in Q4_0 are dequantised to bf16: they are stacked with floats, or" in caplog.text


def test_files_that_are_not_written_so_are_refused(tmp_path: Path) -> None:
    module = module_of("qwen3_moe")
    module.config.moe_intermediate_size = 23
    path = write_gguf(tmp_path / "model.gguf", module)
    with pytest.raises(
        ModelError, match=r"'blk.0.ffn_gate_exps.weight' has shape \(6, 24, 40\).* asks for \(6, 23, 40\)"
    ):
        Engine.from_pretrained(path)
    path = write_gguf(tmp_path / "other.gguf", tiny_module("qwen3"), Type.F32, None, **{"qwen3.expert_count": 7})
    with pytest.raises(ModelError, match="qwen3 with experts is not supported"):
        Engine.from_pretrained(path)
    with_dense = tiny_module("qwen3_moe with dense layers", use_sliding_window=False)
    with_dense.save_pretrained(tmp_path / "folder")
    with pytest.raises(ModelError, match="in GGUF's qwen3_moe every layer has experts, and the shares of those"):
        write_checkpoint(tmp_path / "folder", "q8_0", tmp_path / "written.gguf")


def test_a_part_of_a_stack_is_an_expert_s(tmp_path: Path) -> None:
    module = module_of("qwen3_moe")
    stack = GgufFile(write_gguf(tmp_path / "model.gguf", module)).tensors["blk.2.ffn_down_exps.weight"]
    expected = dict(module.named_parameters())["model.layers.2.mlp.experts.down_proj"]
    for expert in (0, 5):
        assert torch.equal(stack.part(expert).bytes().view(torch.float32).view(40, 24), expected[expert])
