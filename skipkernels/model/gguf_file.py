"""GgufFile: the header of a GGUF file, or of several that one model was split into, and its tensors' bytes.

The header is read here and not by the ``gguf`` package: it checks no length against the file, and takes 2.4 s for a
vocabulary of 49,152 where this takes 0.1. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from skipkernels.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
Scalar = int | float | bool | str
Value = Scalar | list[Scalar]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_ARRAY = 1 << 24
"""Elements: the largest vocabularies and merge lists have a few hundred thousand."""
_MAX_DIMS = 4
_SPLIT_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_SAMPLES, _SAMPLE_BYTES = 16, 256
"""Of every tensor, for the hash: evenly spread places, and bytes at each."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: ``shape`` as torch has it (rows, columns), ``type`` one of GGUF's, ``offset`` in bytes from
    the beginning of ``path``."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    path: Path
    offset: int
    nbytes: int

    def bytes(self) -> torch.Tensor:
        """u8 [nbytes], mapped: pages are read when they are used, and go when the last tensor over them does."""
        start = self.offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            # a private mapping is writable, as torch wants it, and never writes to the file
            mapped = mmap.mmap(file.fileno(), self.offset - start + self.nbytes, access=mmap.ACCESS_COPY, offset=start)
        return torch.frombuffer(mapped, dtype=torch.uint8)[self.offset - start :]

    def part(self, index: int) -> GgufTensor:
        """Of a tensor [parts, rows, columns] one part."""
        nbytes = self.nbytes // self.shape[0]
        return replace(self, shape=self.shape[1:], offset=self.offset + index * nbytes, nbytes=nbytes)


class GgufFile:
    """Metadata and tensors by name. Everything is checked against the length of the files; no weight is read.

    Raises:
        ModelError: no GGUF file, one of another version or byte order, truncated, or with a tensor of an unknown type.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        first = _Header(path)
        self.metadata: Mapping[str, Value] = first.metadata
        self.kinds: Mapping[str, tuple[int, int | None]] = first.kinds
        self.tensors: dict[str, GgufTensor] = {}
        parts = _parts(path, first.metadata)
        for part in parts:
            header = first if part == path else _Header(part)
            for name, tensor in header.tensors.items():
                if name in self.tensors:
                    raise ModelError(f"{part}: tensor {name!r} stands also in {self.tensors[name].path.name}")
                self.tensors[name] = tensor
        count = first.metadata.get("split.tensors.count", len(self.tensors))
        if len(parts) > 1 and count != len(self.tensors):
            raise ModelError(f"{path}: its parts hold {len(self.tensors)} tensors, split.tensors.count says {count}")

    def contents(self) -> str:
        """A hash over samples of every tensor's bytes, 16 hex digits: the same in whatever dtype they are loaded."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tensor.shape} {tensor.type.name}".encode())
            with tensor.path.open("rb") as file:  # not through the mapping, whose pages would count as memory
                for index in range(_SAMPLES):
                    file.seek(tensor.offset + tensor.nbytes * index // _SAMPLES)
                    digest.update(file.read(min(_SAMPLE_BYTES, tensor.nbytes)))
        return digest.hexdigest()[:16]


class _Header:
    """What stands in front of one file's weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = path.stat().st_size
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                self._data, self._at = mapped, 0
                self._read()
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{path}: cannot be read as a GGUF file ({error})") from error

    def _read(self) -> None:
        magic = self._take(4)
        if magic != MAGIC:
            raise ModelError(f"{self.path}: is no GGUF file: it begins with {magic!r}, not with {MAGIC!r}")
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(struct.pack(">I", version), "little") in VERSIONS
            known = " and ".join(map(str, VERSIONS))
            reason = "is in big-endian byte order" if swapped else f"has version {version}"
            raise ModelError(f"{self.path}: this GGUF file {reason}; versions {known}, little-endian, are read")
        num_tensors, num_entries = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Value] = {}
        self.kinds: dict[str, tuple[int, int | None]] = {}  # of every value, and of an array's elements
        for _ in range(num_entries):
            key = self._string()
            if key in self.metadata:
                raise ModelError(f"{self.path}: metadata {key!r} stands there twice")
            self.metadata[key] = self._value(key)
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ModelError(f"{self.path}: general.alignment must be a power of two, got {alignment!r}")
        base = -(-self._at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise ModelError(f"{self.path}: tensor {name!r} stands there twice")
            self.tensors[name] = self._tensor(name, shape, kind, base + offset)

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        try:
            of_type = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ModelError(f"{self.path}: tensor {name!r} has type {kind}, which is not known") from error
        block, block_bytes = GGML_QUANT_SIZES[of_type]
        if any(size < 1 for size in shape) or shape[-1] % block:
            raise ModelError(
                f"{self.path}: tensor {name!r} has shape {shape}, which is no whole number of blocks of {of_type.name}"
            )
        nbytes = math.prod(shape) // block * block_bytes
        if offset + nbytes > self._size:
            raise ModelError(
                f"{self.path}: is truncated or corrupt: tensor {name!r} ends at byte {offset + nbytes:,}, the file has "
                f"{self._size:,}"
            )
        return GgufTensor(name, shape, of_type, self.path, offset, nbytes)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims = self._number("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise ModelError(f"{self.path}: tensor {name!r} has {dims} dimensions, expected 1 to {_MAX_DIMS}")
        shape = tuple(self._number("Q") for _ in range(dims))[::-1]
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, key: str) -> Value:
        kind = self._number("I")
        self.kinds[key] = kind, None
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalars(key, kind, 1)[0]
        of, count = self._number("I"), self._number("Q")
        self.kinds[key] = kind, of
        if count > _MAX_ARRAY:
            raise ModelError(f"{self.path}: metadata {key!r} has {count:,} elements, more than any model's")
        return [self._string() for _ in range(count)] if of == _STRING else self._scalars(key, of, count)

    def _scalars(self, key: str, kind: int, count: int) -> list[Scalar]:
        if kind not in _SCALARS:
            raise ModelError(f"{self.path}: metadata {key!r} has values of type {kind}, which is not known")
        code = f"<{count}{_SCALARS[kind]}"
        return list(struct.unpack(code, self._take(struct.calcsize(code))))

    def _number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0])

    def _string(self) -> str:
        raw = self._take(self._number("Q"))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: is corrupt: text in its header is no UTF-8 ({error})") from error

    def _take(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise ModelError(
                f"{self.path}: is truncated or corrupt: its header wants {count:,} bytes at {self._at:,}, the file has "
                f"{self._size:,}"
            )
        self._at += count
        return self._data[self._at - count : self._at]


def gguf_of_folder(folder: Path) -> Path | None:
    """The GGUF file of a folder, the first one of a model that was split; None where there is none.

    Raises:
        ModelError: there are several models.
    """
    found = sorted(folder.glob("*.gguf"))
    first = [path for path in found if not (split := _SPLIT_NAME.fullmatch(path.name)) or int(split[2]) == 1]
    if found and len(first) != 1:
        listed = ", ".join(path.name for path in first or found)
        raise ModelError(f"{folder}: holds {len(first)} models in GGUF files ({listed}); give the path of one")
    return first[0] if first else None


def _parts(path: Path, metadata: Mapping[str, Value]) -> list[Path]:
    count = metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return [path]
    split = _SPLIT_NAME.fullmatch(path.name)
    if split is None or int(split[3]) != count or int(split[2]) != 1 or metadata.get("split.no") != 0:
        raise ModelError(
            f"{path}: is one of {count} parts; give the first, under its own name ending in -00001-of-{count:05}.gguf"
        )
    parts = [path.with_name(f"{split[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise ModelError(f"{path}: is one of {count} parts, and {part.name} is missing beside it")
    return parts
