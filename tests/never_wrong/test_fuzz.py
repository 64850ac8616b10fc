"""Spoiled checkpoints: transformers' tokens, or one line of ours; never another answer, never a traceback."""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from skipkernels import SkipkernelsError
from tests.models import EOS, tiny_module
from tests.never_wrong.folders import PROMPT, engine_of, expected_tokens, loaded, save

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = 6
WRONG = st.sampled_from(
    [None, True, False, 0, 1, 2, 3, 4, 7, -1, 2.5, 1e400, "", "x", "3", [], [2], [EOS, 3], [None], {}, {"x": 1}]
)
ENTRIES: dict[str, list[tuple[str, Any]]] = {
    "config.json": [
        ("sliding_window", 3),
        ("layer_types", ["sliding_attention"] * 4),
        ("layer_types", ["full_attention", "sliding_attention"] * 2),
        ("use_sliding_window", True),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", True),
        ("quantization_config", {"quant_method": "fp8"}),
        ("eos_token_id", [3, 49, 158, 230]),
        ("head_dim", 10),
        ("num_hidden_layers", 3),
        ("rope_theta", 500.0),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("partial_rotary_factor", 0.5),
        ("max_position_embeddings", 8),
        ("dtype", "float64"),
        ("text_config", {"eos_token_id": 3}),
        ("logits_scaling", 3.0),
    ],
    "generation_config.json": [
        ("eos_token_id", [3, 49, 158, 230]),
        ("repetition_penalty", 1.5),
        ("no_repeat_ngram_size", 2),
        ("suppress_tokens", [230]),
        ("temperature", -1.0),
        ("an unknown entry", {"x": 1}),
        ("bos_token_id", 3),
        ("num_beams", 2),
        ("max_new_tokens", 3),
    ],
    "model.safetensors.index.json": [("weight_map", {"model.norm.weight": "model.safetensors"}), ("metadata", None)],
    "tokenizer_config.json": [
        ("eos_token", "a"),
        ("bos_token", None),
        ("tokenizer_class", "LlamaTokenizer"),
        ("tokenizer_class", "NoSuchTokenizer"),
        ("added_tokens_decoder", {"3": {"content": "x", "special": True}}),
        ("auto_map", {"AutoTokenizer": ["own.Own", None]}),
    ],
    "tokenizer.json": [("model", None), ("decoder", {"type": "Fuse"}), ("added_tokens", []), ("version", 2)],
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each family, in one file and in shards."""
    folders = {}
    for family in FAMILIES:
        folders[family] = save(tmp_path_factory.mktemp(family), family, tokenizer=True)
        shards = folders[f"{family} in shards"] = tmp_path_factory.mktemp(family)
        save(shards, family, tokenizer=True)
        (shards / "model.safetensors").unlink()
        tiny_module(family).save_pretrained(shards, max_shard_size="60KB")
    return folders


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, str, Any]:
    """A file, a way to spoil it, and what that takes."""
    name = draw(st.sampled_from(sorted(ENTRIES)))
    how = draw(st.sampled_from(["contradict", "wrong", "drop", "null", "duplicate", "truncate", "remove", "whole"]))
    if how == "contradict":
        return name, how, draw(st.sampled_from(ENTRIES[name]))
    if how == "whole":
        return name, how, draw(st.sampled_from(["", "[]", "null", "3", '"x"', "{}", "{", "\udcff"]))
    return name, how, (draw(st.integers(0, 40)), draw(WRONG))


def spoil(folder: Path, name: str, how: str, what: Any) -> None:
    path = folder / name
    if not path.exists():
        return
    if how == "remove":
        path.unlink()
    elif how == "whole":
        path.write_bytes(what.encode(errors="surrogateescape"))
    elif how == "contradict":
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {what[0]: what[1]}))
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[: what[0] * 7])
    else:
        document = json.loads(path.read_text())
        _spoil_entry(document, how, *what)
        text = json.dumps(document)
        if how == "duplicate" and document:
            key = list(document)[what[0] % len(document)]
            text = text[:-1] + f", {json.dumps(key)}: {json.dumps(what[1])}}}"
        path.write_text(text)


def _spoil_entry(document: dict[str, Any], how: str, which: int, value: Any) -> None:
    """Spoils one of the entries, or one inside of an entry that is a dictionary."""
    if not document or how == "duplicate":
        return
    key = list(document)[which % len(document)]
    if isinstance(document[key], dict) and document[key] and which % 2:
        _spoil_entry(document[key], how, which // 2, value)
    elif how == "drop":
        del document[key]
    else:
        document[key] = None if how == "null" else copy.deepcopy(value)


def tokens_of_transformers(folder: Path) -> list[int] | None:
    """None where transformers cannot decode it."""
    try:
        module = loaded(folder)
        ids = torch.tensor([PROMPT])
        penalty = module.generation_config.repetition_penalty
        if penalty not in (None, 1.0):
            output = module.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False, use_cache=False
            )
            return output[0, len(PROMPT) :].tolist()
        return expected_tokens(module, count=TOKENS)
    except Exception:
        return None


def outcome(folder: Path) -> list[int] | None:
    """Our tokens; None for an error of ours, which must be one line."""
    try:
        engine = engine_of(folder, max_seq_len=16)
        return engine.generate(PROMPT, max_new_tokens=TOKENS)[0].token_ids
    except SkipkernelsError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return None


def assert_same_or_refused(sound: Path, *spoiled: tuple[str, str, Any]) -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        shutil.copytree(sound, folder)
        for mutation in spoiled:
            spoil(folder, *mutation)
        ours = outcome(folder)
        if ours is not None:
            assert ours == tokens_of_transformers(folder)


@pytest.mark.parametrize("family", [*FAMILIES, "llama in shards"])
def test_every_contradiction(sound: dict[str, Path], family: str) -> None:
    for name, entries in ENTRIES.items():
        for entry in entries:
            assert_same_or_refused(sound[family], (name, "contradict", entry))
            assert_same_or_refused(
                sound[family], ("generation_config.json", "remove", None), (name, "contradict", entry)
            )


@pytest.mark.parametrize("family", [*FAMILIES, *(f"{family} in shards" for family in FAMILIES[:2])])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(spoiled=st.lists(mutations(), min_size=1, max_size=2, unique_by=lambda mutation: mutation[0]))
def test_spoiled_json(sound: dict[str, Path], family: str, spoiled: list[tuple[str, str, Any]]) -> None:
    assert_same_or_refused(sound[family], *spoiled)


@st.composite
def tensor_changes(draw: st.DrawFn) -> tuple[str, int, Any]:
    how = draw(st.sampled_from(["drop", "dtype", "shape", "rename", "extra", "transpose"]))
    dtype = draw(
        st.sampled_from([torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.bool])
    )
    suffix = draw(st.sampled_from(["_scale", ".absmax", "_extra", ".lora_A", "2"]))
    return how, draw(st.integers(0, 60)), dtype if how == "dtype" else suffix


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(change=tensor_changes())
def test_spoiled_tensors(sound: dict[str, Path], family: str, change: tuple[str, int, Any]) -> None:
    how, which, what = change
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        shutil.copytree(sound[family], folder)
        tensors = load_file(folder / "model.safetensors")
        name = sorted(tensors)[which % len(tensors)]
        if how == "extra":
            tensors[name + what] = torch.ones(3)
        elif how == "dtype":
            tensors[name] = tensors[name].to(what)
        else:
            tensor = tensors.pop(name)
            renamed = {"rename": name + what, "shape": name, "transpose": name}.get(how)
            if renamed is not None:
                changed = {"shape": tensor[:-1].clone(), "transpose": tensor.t().contiguous()}.get(how, tensor)
                tensors[renamed] = changed
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        ours = outcome(folder)
        if ours is not None:
            assert ours == tokens_of_transformers(folder)
