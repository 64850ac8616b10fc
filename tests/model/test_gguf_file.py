"""A GGUF file's header: read as the gguf package reads it, and whatever is wrong with it is an error that says so."""

import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from skipkernels import Engine
from skipkernels.errors import ModelError
from skipkernels.model.gguf_file import GgufFile
from tests.gguf_files import write_gguf
from tests.models import tiny_module


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    tokens = ["a", "b", "ü", "<end>"]
    return write_gguf(path, tiny_module("llama"), **{"tokenizer.ggml.tokens": tokens, "some.flag": True}).read_bytes()


def written(tmp_path: Path, data: bytes, name: str = "model.gguf") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def test_metadata_and_tensors_are_those_the_package_reads(tmp_path: Path, good: bytes) -> None:
    path = written(tmp_path, good)
    own, reader = GgufFile(path), gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert own.metadata == fields
    assert own.metadata["tokenizer.ggml.tokens"][2] == "ü"
    assert list(own.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        mine = own.tensors[tensor.name]
        assert (mine.shape, mine.type) == (tuple(tensor.shape.tolist()[::-1]), tensor.tensor_type)
        assert mine.bytes().numpy().tobytes() == np.ascontiguousarray(tensor.data).tobytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: b"GGML" + data[4:], "no GGUF file: it begins with b'GGML'"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "has version 1; versions 2 and 3"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "big-endian"),
        (lambda data: data[:100], "truncated or corrupt"),
        (lambda data: data[:-64], "truncated or corrupt: tensor"),
        (lambda data: data[:8] + struct.pack("<Q", 1 << 60) + data[16:], "corrupt|0 dimensions"),
        (lambda data: data[:16] + struct.pack("<Q", 1 << 60) + data[24:], "corrupt|not known|twice"),
        (lambda data: data[:24] + struct.pack("<Q", 1 << 62) + data[32:], "wants .* bytes at 32"),
        (lambda data: data.replace(b"llama", b"gpt99"), "architecture 'gpt99' is not supported; supported are llama"),
        (lambda data: data.replace(b"llama.block_count", b"llama.block_coun_"), "llama.block_count is missing"),
        (lambda data: data.replace(b"general.architecture", b"general.architectur_"), "architecture is missing"),
        (lambda data: data.replace(b"blk.0.attn_norm", b"blk.0.attn_nor_"), "'blk.0.attn_norm.weight' is missing"),
        (lambda data: data.replace(b"token_embd", b"token_emb_"), "'token_embd.weight' is missing"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, good: bytes, change: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Engine.from_pretrained(written(tmp_path, change(good)))  # type: ignore[operator]


def test_a_tensor_of_another_shape_or_type_is_named(tmp_path: Path, good: bytes) -> None:
    at = good.index(b"output_norm.weight") + len(b"output_norm.weight")
    smaller = struct.pack("<Q", 32)
    with pytest.raises(ModelError, match=r"'output_norm.weight' has shape \(32,\), its metadata asks for"):
        Engine.from_pretrained(written(tmp_path, good[: at + 4] + smaller + good[at + 12 :]))
    kind = struct.pack("<I", 999)
    with pytest.raises(ModelError, match=r"'output_norm.weight' has type 999, which is not known"):
        Engine.from_pretrained(written(tmp_path, good[: at + 12] + kind + good[at + 16 :]))
    integers = struct.pack("<I", int(gguf.GGMLQuantizationType.I32))
    with pytest.raises(ModelError, match="of type I32, which cannot be dequantised"):
        Engine.from_pretrained(written(tmp_path, good[: at + 12] + integers + good[at + 16 :]))


def test_a_tensor_without_meaning_is_refused(tmp_path: Path) -> None:
    module = tiny_module("llama")
    path = write_gguf(tmp_path / "model.gguf", module)
    data, layers = path.read_bytes(), module.config.num_hidden_layers
    key = b"llama.block_count" + struct.pack("<II", 4, layers)
    assert key in data
    path.write_bytes(data.replace(key, b"llama.block_count" + struct.pack("<II", 4, layers - 1)))
    with pytest.raises(ModelError, match=f"such as 'blk.{layers - 1}.* mean nothing to this model"):
        Engine.from_pretrained(path)


def test_a_thousand_broken_headers(tmp_path: Path, good: bytes) -> None:
    """Bytes of the header changed, numbers made huge, ends cut off: an error of ours or a file that happens to be
    readable, never another error, nor much memory or time."""
    generator, huge = np.random.default_rng(0), [0, 1 << 31, 1 << 40, 1 << 63, (1 << 64) - 1]
    header = good.index(b"blk.0") + 400
    path, started, read = tmp_path / "broken.gguf", time.monotonic(), 0
    tracemalloc.start()
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(generator.integers(1, 4)):
            at = int(generator.integers(0, header - 8))
            kind = generator.integers(0, 3)
            if kind == 0:
                data[at] = generator.integers(0, 256)
            elif kind == 1:
                data[at : at + 8] = struct.pack("<Q", huge[generator.integers(0, len(huge))])
            else:
                del data[int(generator.integers(8, header)) :]
                break
        path.write_bytes(data)
        try:
            GgufFile(path)
            read += 1
        except ModelError:
            pass
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()
    assert time.monotonic() - started < 60
    assert read < 700


def split(path: Path, parts: int) -> list[Path]:
    """The file's tensors over several files, as gguf-split writes them."""
    reader = gguf.GGUFReader(path)
    written = []
    for number in range(parts):
        part = path.with_name(f"split-{number + 1:05}-of-{parts:05}.gguf")
        writer = gguf.GGUFWriter(part, "llama")
        if number == 0:
            for name, field in reader.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    sub_type = field.types[1] if len(field.types) > 1 else None
                    writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::parts]:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written.append(part)
    path.unlink()
    return written


def test_split_files_and_folders(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf", tiny_module("llama"))
    expected = Engine.from_pretrained(tmp_path).generate([[5, 6, 7]], max_new_tokens=8)
    parts = split(whole, 3)
    for given in (parts[0], tmp_path):
        assert Engine.from_pretrained(given).generate([[5, 6, 7]], max_new_tokens=8)[0].token_ids == (
            expected[0].token_ids
        )
    with pytest.raises(ModelError, match="give the first"):
        Engine.from_pretrained(parts[1])
    parts[2].unlink()
    with pytest.raises(ModelError, match=f"{parts[2].name} is missing beside it"):
        Engine.from_pretrained(tmp_path)
    write_gguf(tmp_path / "another.gguf", tiny_module("llama"))
    with pytest.raises(ModelError, match="holds 2 models in GGUF files"):
        Engine.from_pretrained(tmp_path)
