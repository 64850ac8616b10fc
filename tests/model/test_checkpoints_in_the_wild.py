"""Folders as people have them: decoded as transformers decodes them, or refused with what to do."""

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from skipkernels.decoding.generation import SamplingParams
from skipkernels.engine import Engine
from skipkernels.errors import ModelError, RequestError
from skipkernels.model.checkpoint import resolve_checkpoint
from tests.gguf_files import write_gguf
from tests.models import BOS, tiny_engine, tiny_module
from tests.never_wrong.folders import (
    PROMPT,
    WEIGHTS,
    edit_json,
    edit_tensors,
    engine_of,
    engine_tokens,
    expected_tokens,
    loaded,
    save,
)


def rename(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def module_tokens(module: PreTrainedModel) -> list[int]:
    return tiny_engine(module=module).generate(PROMPT, max_new_tokens=16)[0].token_ids


# --- vocabularies


def test_a_vocabulary_is_padded_beyond_the_tokenizer(tmp_path: Path) -> None:
    """Its extra rows are tokens like others to the model, and no text."""
    save(tmp_path, tokenizer=True, vocab_size=320)
    engine = engine_of(tmp_path)
    (answer,) = engine.generate("héllo", max_new_tokens=16)
    assert answer.token_ids == expected_tokens(loaded(tmp_path), engine.encode("héllo"))
    (beyond,) = engine.generate([300, 319], max_new_tokens=1, sampling=SamplingParams(logit_bias=((310, 100.0),)))
    assert (beyond.token_ids, beyond.text) == ([310], "")


def test_a_tokenizer_has_tokens_that_the_model_has_not(tmp_path: Path) -> None:
    save(tmp_path, tokenizer=True, vocab_size=200, bos_token_id=None)
    engine = engine_of(tmp_path)
    assert engine.generate([65, 66], max_new_tokens=4)[0].token_ids == expected_tokens(loaded(tmp_path), [65, 66], 4)
    with pytest.raises(RequestError, match=f"token id {BOS} is outside the vocabulary of 200"):
        engine.generate("hi")


@pytest.mark.parametrize("ending", [0, 1, 2])
def test_any_of_several_end_tokens_ends(tmp_path: Path, ending: int) -> None:
    save(tmp_path)
    tokens = expected_tokens(loaded(tmp_path))
    ends = [258, 257, 256]
    ends[ending] = tokens[4]
    edit_json(tmp_path, eos_token_id=257)  # as Llama 3's folders have it: config.json names one, the other file more
    edit_json(tmp_path, "generation_config.json", eos_token_id=ends)
    assert engine_tokens(tmp_path) == expected_tokens(loaded(tmp_path)) == tokens[: tokens.index(tokens[4]) + 1]


# --- configurations of older releases

LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.7, 2.0], "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0]}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OLD_ROPES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_theta": 500.0, "rope_scaling": None}),
    ("llama", {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
    ("qwen2", {"rope_theta": 1000000.0}),
    ("phi3 with longrope and a sliding window", {"rope_scaling": {"type": "longrope", **LONGROPE}}),
    (
        "gemma3_text",
        {
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 6,
        },
    ),
]


@pytest.mark.parametrize(("family", "entries"), OLD_ROPES, ids=[f"{family} {rope}" for family, rope in OLD_ROPES])
def test_rotary_parameters_stand_in_their_old_form(tmp_path: Path, family: str, entries: dict[str, Any]) -> None:
    save(tmp_path, family)
    before = engine_of(tmp_path).weights.rope_cos
    edit_json(tmp_path, drop=["rope_parameters", "layer_types"], **entries)
    assert engine_tokens(tmp_path) == expected_tokens(loaded(tmp_path))
    changed = not torch.equal(engine_of(tmp_path).weights.rope_cos, before)
    assert changed == ("longrope" not in str(entries) and family != "gemma3_text")  # which say the same in another way


def test_longrope_has_its_first_name(tmp_path: Path) -> None:
    """transformers 5 refuses it; it is longrope."""
    save(tmp_path, "phi3 with longrope and a sliding window")
    edit_json(tmp_path, drop=["rope_parameters"], rope_theta=10000.0, rope_scaling={"type": "su", **LONGROPE})
    tokens = engine_tokens(tmp_path)
    edit_json(tmp_path, rope_scaling={"type": "longrope", **LONGROPE})
    assert tokens == expected_tokens(loaded(tmp_path))


@pytest.mark.parametrize("family", ["llama", "mistral", "mixtral"])
def test_head_dim_is_null(tmp_path: Path, family: str) -> None:
    save(tmp_path, family)
    edit_json(tmp_path, head_dim=None)
    assert engine_tokens(tmp_path) == expected_tokens(loaded(tmp_path))


@pytest.mark.parametrize("family", ["qwen2", "granite", "phi3", "smollm3"])
def test_head_dim_is_null_where_transformers_stumbles(tmp_path: Path, family: str) -> None:
    save(tmp_path, family)
    expected = expected_tokens(loaded(tmp_path))
    edit_json(tmp_path, head_dim=None)
    assert engine_tokens(tmp_path) == expected


# --- names and numbers of tensors


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "two files"])
def test_tied_weights_are_saved_twice(tmp_path: Path, sharded: bool) -> None:
    save(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / WEIGHTS)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    if sharded:
        names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
        names["lm_head.weight"] = "model-00002-of-00002.safetensors"
        (tmp_path / WEIGHTS).unlink()
        save_file(tensors, tmp_path / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
        save_file(head, tmp_path / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors | head, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert engine_tokens(tmp_path) == expected_tokens(loaded(tmp_path))


def test_the_head_is_saved_nowhere_and_not_tied(tmp_path: Path) -> None:
    """transformers would draw one at random."""
    save(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelError, match=r"tensor 'lm_head.weight' is missing from the checkpoint"):
        engine_of(tmp_path)


@pytest.mark.parametrize("outer", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_module_was_saved_inside_another(tmp_path: Path, outer: str, tied: bool) -> None:
    """By DistributedDataParallel, torch.compile or peft. transformers reads such names as unknown ones."""
    save(tmp_path, tie_word_embeddings=tied)
    expected = expected_tokens(loaded(tmp_path))
    rename(tmp_path, lambda name: outer + name)
    assert engine_tokens(tmp_path) == expected


def peft_name(name: str) -> str:
    wrapped = "q_proj" in name or "v_proj" in name
    return "base_model.model." + (name.replace(".weight", ".base_layer.weight") if wrapped else name)


def test_an_adapter_was_merged_but_not_unloaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path)
    expected = expected_tokens(loaded(tmp_path))
    rename(tmp_path, peft_name)
    with caplog.at_level(logging.WARNING):
        assert engine_tokens(tmp_path) == expected
    assert "what an adapter learned is in them only if it was merged" in caplog.text


def test_an_adapter_that_is_not_merged_is_refused(tmp_path: Path) -> None:
    save(tmp_path)
    rename(tmp_path, peft_name)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    edit_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(2, 40)}))
    with pytest.raises(ModelError, match=f"tensor '{name}' means nothing to this model; .* an adapter"):
        engine_of(tmp_path)


def test_base_layers_without_peft_s_prefix_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    rename(tmp_path, lambda name: peft_name(name).removeprefix("base_model.model."))
    with pytest.raises(ModelError, match=r"base_layer.weight' means nothing to this model"):
        engine_of(tmp_path)


def test_heads_of_other_tasks_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path)
    extra = {"v_head.summary.weight": torch.ones(1, 40), "score.weight": torch.ones(3, 40)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(extra))
    with caplog.at_level(logging.WARNING):
        assert engine_tokens(tmp_path) == expected_tokens(loaded(tmp_path))
    assert "left out 2 tensors" in caplog.text


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused_with_how_to_convert(tmp_path: Path, name: str) -> None:
    save(tmp_path)
    torch.save(load_file(tmp_path / WEIGHTS), tmp_path / name)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=rf"pickled \({name}\).*Convert .*save_pretrained"):
        engine_of(tmp_path)


def test_the_way_to_convert_is_right(tmp_path: Path) -> None:
    save(tmp_path / "old")
    torch.save(load_file(tmp_path / "old" / WEIGHTS), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / WEIGHTS).unlink()
    module = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    module.save_pretrained(tmp_path / "new")
    assert engine_tokens(tmp_path / "new") == expected_tokens(module)


# --- where folders lie


def cached(cache: Path, source: Path) -> Path:
    """A folder as the hub's cache holds it: links into blobs. Returns the repository's folder."""
    repository = cache / "models--org--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    for index, file in enumerate(sorted(source.iterdir())):
        (repository / "blobs" / f"{index:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{index:040x}")
    (repository / "refs" / "main").write_text("a" * 40)
    return repository


def test_the_hub_s_cache_is_read_by_snapshot_by_repository_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", tokenizer=True)
    repository = cached(tmp_path / "cache", source)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = expected_tokens(loaded(source))
    for model in (repository / "snapshots" / ("a" * 40), repository, "org/tiny"):
        engine = Engine.from_pretrained(model, dtype="fp32", max_seq_len=96, num_threads=1)
        assert engine.generate(PROMPT, max_new_tokens=16)[0].token_ids == expected
    (repository / "refs" / "main").unlink()
    with pytest.raises(ModelError, match=f"give one of its snapshots' folders: {'a' * 40}"):
        engine_of(repository)


def test_a_repository_of_the_cache_may_hold_a_gguf_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    write_gguf(tmp_path / "source" / "model.gguf", loaded(save(tmp_path / "folder")))
    repository = cached(tmp_path / "cache", tmp_path / "source")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model in (repository, "org/tiny"):
        assert resolve_checkpoint(model) == repository / "snapshots" / ("a" * 40) / "model.gguf"


def test_a_blob_of_the_cache_is_gone(tmp_path: Path) -> None:
    repository = cached(tmp_path, save(tmp_path / "source"))
    (repository / "snapshots" / ("a" * 40) / WEIGHTS).resolve().unlink()
    with pytest.raises(ModelError, match=f"holds neither {WEIGHTS} nor"):
        engine_of(repository)


def test_a_folder_may_not_be_written() -> None:
    """By a user without rights, where the tests run as root."""
    with tempfile.TemporaryDirectory() as parent:  # pytest's own folders may be entered by their user alone
        folder = save(Path(parent) / "model", tokenizer=True)
        expected, before = expected_tokens(loaded(folder)), sorted(path.name for path in folder.iterdir())
        for path in (*folder.iterdir(), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
        Path(parent).chmod(0o755)
        program = (
            "import os\nfrom skipkernels.engine import Engine\n"
            f"def tokens(): return Engine.from_pretrained({str(folder)!r}, dtype='fp32', max_seq_len=96,"
            f" num_threads=1).generate({PROMPT}, max_new_tokens=16)[0].token_ids\n"
            "tokens()  # imports all it needs, which a user without rights perhaps cannot\n"
            "os.geteuid() == 0 and os.setresuid(65534, 65534, 65534)\n"
            f"assert not os.access({str(folder)!r}, os.W_OK)\n"
            "print(tokens())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == expected
        assert sorted(path.name for path in folder.iterdir()) == before
        folder.chmod(0o755)


# --- code of their own


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code that must not run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    save(tmp_path, "phi3", tokenizer=True)
    classes = {"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit_json(tmp_path, auto_map=classes)
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (tmp_path / name).write_text("raise SystemExit('the code ran')")
    return tmp_path


def test_a_model_of_its_own_code_is_refused(own_code: Path) -> None:
    edit_json(own_code, model_type="own_model")
    with pytest.raises(ModelError, match="the model is code of its own, which is never run"):
        engine_of(own_code)


def test_a_known_model_that_brings_its_first_code_is_read_without_it(own_code: Path) -> None:
    """As by transformers: Phi-3's folders hold the code from before it knew them."""
    assert engine_tokens(own_code) == expected_tokens(loaded(own_code))


def test_a_tokenizer_of_its_own_code_is_refused(own_code: Path) -> None:
    save(own_code)  # a Llama; of Phi-3 transformers knows the tokenizer by the model
    classes = {"AutoTokenizer": ["tokenization_own.Own", None]}
    edit_json(own_code, "tokenizer_config.json", tokenizer_class="Own", auto_map=classes)
    with pytest.raises(ModelError, match="it is code of its own, which is never run; pass tokenizer="):
        engine_of(own_code)


# --- modules that accelerate has placed


def test_a_dispatched_module_is_read_like_any_other() -> None:
    module = tiny_module()
    expected = expected_tokens(module)
    places = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    placed = dispatch_model(module, places, main_device="cpu", force_hooks=True)
    assert "forward" in vars(placed.model.layers[0].mlp.up_proj)
    assert module_tokens(placed) == expected
    assert expected_tokens(placed) == expected, "the module is spoilt"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_module_with_offloaded_weights_is_refused(tmp_path: Path, place: str) -> None:
    module = tiny_module()
    if place == "cpu":
        cpu_offload(module, execution_device=torch.device("cpu"))
    else:
        disk_offload(module, str(tmp_path), execution_device=torch.device("cpu"))
    assert module.model.layers[0].mlp.up_proj.weight.is_meta
    with pytest.raises(ModelError, match=r"was offloaded by accelerate.*load it without device_map"):
        tiny_engine(module=module)


def test_another_hook_of_accelerate_is_refused() -> None:
    class Doubling(ModelHook):
        def post_forward(self, module: torch.nn.Module, output: Any) -> Any:
            return output * 2

    module = tiny_module()
    add_hook_to_module(module.model.layers[1].mlp, Doubling())
    with pytest.raises(ModelError, match=r"forward of 'model.layers.1.mlp' was replaced"):
        tiny_engine(module=module)
