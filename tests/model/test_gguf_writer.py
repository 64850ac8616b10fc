"""Files that ``quantize`` writes, read back as the checkpoint they are made from: by us, transformers and llama.cpp."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from skipkernels import Engine
from skipkernels.errors import ModelError
from skipkernels.model import gguf_writer
from skipkernels.model.gguf_file import GgufFile
from skipkernels.model.gguf_splits import PATTERNS, split_name
from skipkernels.model.gguf_writer import write_gguf
from tests.models import EOS, byte_tokenizer, random_prompt, tiny_module
from tests.real_models import smollm2_folder, smollm2_gguf

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
QUESTION = "What is the capital of France, and what is it known for?"
PROMPT = random_prompt(80)
LLAMA_CPP = os.environ.get("LLAMA_CPP_BIN", "")
"""The folder of llama.cpp's programs."""
needs_llama_cpp = pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP_BIN does not name llama.cpp's build/bin")


def folder_of(tmp_path: Path, family: str, **overrides: Any) -> Path:
    tiny_module(family, **SIZES, eos_token_id=EOS, **overrides).save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's split
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def tokens_of(model: Any, **options: Any) -> list[int]:
    engine = Engine.from_pretrained(model, num_threads=1, max_seq_len=256, **options)
    return engine.generate([PROMPT], max_new_tokens=24, eos_token_ids=[])[0].token_ids


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama with llama3 rope", {}),
        ("llama with linear rope", {}),
        ("llama with yarn rope", {}),
        ("llama with attention bias", {}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
    ],
)
def test_a_file_decodes_as_the_checkpoint_it_was_made_from(
    tmp_path: Path, family: str, overrides: dict[str, Any]
) -> None:
    folder = folder_of(tmp_path, family, **overrides)
    floats = write_gguf(folder, "fp32", tmp_path / "floats.gguf")
    assert tokens_of(tmp_path / "floats.gguf") == tokens_of(folder)
    assert set(floats.formats) == {"f32"}
    written = write_gguf(folder, "Q4_1", tmp_path / "model.gguf")
    assert tokens_of(tmp_path / "model.gguf") == tokens_of(folder, dtype="q4_1")
    assert written.nbytes == (tmp_path / "model.gguf").stat().st_size
    assert set(written.formats) == {"f32", "q4_1", "q8_0"}
    one, other = Engine.from_pretrained(folder), Engine.from_pretrained(tmp_path / "model.gguf")
    text = "Hello there, 2024!"
    assert one.encode(text) == other.encode(text)
    assert one.default_eos_token_ids == other.default_eos_token_ids[:1] == (EOS,)


def test_transformers_reads_the_same_weights(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama", initializer_range=0.2)
    write_gguf(folder, "q5_0", tmp_path / "model.gguf")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    output = stock.generate(torch.tensor([PROMPT]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert output[0, len(PROMPT) :].tolist() == tokens_of(tmp_path / "model.gguf", dtype="fp32")


def test_a_gguf_is_written_anew_with_all_it_says(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama with llama3 rope")
    write_gguf(folder, "bf16", tmp_path / "one.gguf")
    write_gguf(tmp_path / "one.gguf", "q8_0", tmp_path / "two.gguf")
    one, two = GgufFile(tmp_path / "one.gguf"), GgufFile(tmp_path / "two.gguf")
    assert {**two.metadata, "general.file_type": 32} == one.metadata
    assert two.metadata["general.file_type"] == 7
    assert two.kinds == one.kinds
    assert tokens_of(tmp_path / "two.gguf") == tokens_of(tmp_path / "one.gguf", dtype="q8_0")


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = folder_of(tmp_path, "llama"), tmp_path / "out" / "model.gguf"
    with pytest.raises(ModelError, match=r"cannot be written \(No such file or directory\)"):
        write_gguf(folder, "q8_0", out)
    out.parent.mkdir()
    write_gguf(folder, "q8_0", out)
    before = out.read_bytes()
    with pytest.raises(ModelError, match="exists; give another name, or --force"):
        write_gguf(folder, "q4_0", out)
    with pytest.raises(ModelError, match="is the model itself"):
        write_gguf(out, "q4_0", out, overwrite=True)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_writer, "_data", fail)
        with pytest.raises(KeyboardInterrupt):
            write_gguf(folder, "q4_0", out, overwrite=True)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]
    write_gguf(folder, "q4_0", out, overwrite=True)
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        ("gemma3_text", "q8_0", "family 'gemma3_text' cannot be written as a GGUF file; these can: llama, mistral"),
        ("mistral with a sliding window", "q8_0", "sliding windows cannot be written"),
        ("llama", "q3_k", "unknown type 'q3_k'; use one of q8_0, .*, fp16"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, family: str, kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        write_gguf(folder_of(tmp_path, family), kind, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_sentencepiece_s_byte_pairs(tmp_path: Path) -> None:
    """Of the kind that Llama 2, Mistral and TinyLlama have: merges become scores and come back in their order."""
    folder = folder_of(tmp_path, "llama")
    special = ["<unk>", "<s>", "</s>"]
    vocab = special + [f"<0x{byte:02X}>" for byte in range(256)] + list("▁abcdehlorstw")
    merges = [("h", "e"), ("l", "l"), ("▁", "w"), ("he", "ll"), ("o", "r"), ("▁w", "or"), ("hell", "o"), ("l", "d")]
    vocab += ["".join(merge) for merge in merges]
    tiny_module("llama", **SIZES, vocab_size=len(vocab) + 4).save_pretrained(folder)
    model = models.BPE({text: index for index, text in enumerate(vocab)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )
    tokenizer.save_pretrained(folder)
    write_gguf(folder, "q8_0", tmp_path / "model.gguf")
    own = Engine.from_pretrained(tmp_path / "model.gguf")
    for text in ("hello world", "world hell told", "é well"):
        ids = own.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert own.tokenizer.decode(ids).strip() == text  # type: ignore[union-attr]
    assert own.tokenizer.chat_template == "{{ messages }}"  # type: ignore[union-attr]
    metadata = GgufFile(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"][-1] == "[PAD283]"  # type: ignore[index]
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]  # type: ignore[index]


def test_splits_by_name() -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert split_name(byte_level, "") == "gpt-2"
    assert split_name({"type": "Sequence", "pretokenizers": [digits, byte_level]}, "") == "smollm"
    split = {"type": "Split", "pattern": {"Regex": PATTERNS["qwen2"]}, "behavior": "Isolated", "invert": False}
    after = {**byte_level, "use_regex": False}
    assert split_name({"type": "Sequence", "pretokenizers": [split, after]}, "") == "qwen2"
    split["pattern"] = {"Regex": r"\d"}
    with pytest.raises(ModelError, match="splits text in a way that has no known name in GGUF"):
        split_name({"type": "Sequence", "pretokenizers": [split, after]}, "")
    with pytest.raises(ModelError, match="no known name"):
        split_name(None, "")


def llama_cpp(program: str, *words: str) -> str:
    environment = {**os.environ, "LD_LIBRARY_PATH": LLAMA_CPP}
    done = subprocess.run(
        [f"{LLAMA_CPP}/{program}", *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


@needs_llama_cpp
def test_llama_cpp_runs_it_and_splits_text_alike(tmp_path: Path) -> None:
    folder = smollm2_folder()
    write_gguf(folder, "q4_0", tmp_path / "model.gguf")
    text = "In 2024, it's ünïcode: 日本 <|im_start|>user\n"
    out = llama_cpp("llama-tokenize", "-m", str(tmp_path / "model.gguf"), "--ids", "-p", text)
    assert out.strip().splitlines()[-1] == str(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    words = ("-m", str(tmp_path / "model.gguf"), "-t", "1", "-p", "0", "-n", "2", "-r", "1", "-o", "json")
    assert "Q4_0" in llama_cpp("llama-bench", *words)


@needs_llama_cpp
def test_llama_quantize_writes_the_same_blocks(tmp_path: Path) -> None:
    """From one bf16 file: formats and bytes of every tensor are those that llama.cpp's own program writes."""
    floats = tmp_path / "floats.gguf"
    write_gguf(smollm2_gguf(), "bf16", floats)
    for kind in ("q4_0", "q8_0", "q5_1"):
        write_gguf(floats, kind, tmp_path / "ours.gguf", overwrite=True)
        llama_cpp("llama-quantize", str(floats), str(tmp_path / "theirs.gguf"), kind.upper(), "2")
        ours, theirs = GgufFile(tmp_path / "ours.gguf"), GgufFile(tmp_path / "theirs.gguf")
        assert set(ours.tensors) == set(theirs.tensors)
        different = 0
        for name, tensor in ours.tensors.items():
            assert tensor.type == theirs.tensors[name].type, name
            different += int((tensor.bytes() != theirs.tensors[name].bytes()).sum())
        assert different < 1e-4 * sum(tensor.nbytes for tensor in ours.tensors.values()), kind


def test_the_real_model_answers_from_a_file_of_ours(tmp_path: Path) -> None:
    write_gguf(smollm2_folder(), "q8_0", tmp_path / "model.gguf")
    engine = Engine.from_pretrained(tmp_path / "model.gguf", max_seq_len=256)
    (answer,) = engine.generate([[{"role": "user", "content": QUESTION}]], max_new_tokens=24)
    assert "Paris" in answer.text
