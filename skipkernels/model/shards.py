"""The safetensors files of a checkpoint: which tensor lies where, and whether all of it is understood."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"

FLOATS = ("F32", "BF16", "F16")
_WRAPPERS = (
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
    ("model.text_model.", "lm_head."),
)
"""Where multimodal checkpoints hold their text decoder and its head."""
_OUTER = ("base_model.model.", "module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""In front of every name where a module was saved inside peft's, torch.nn.parallel's, torch.compile's or FSDP's."""
_PEFT_LAYER = ".base_layer."
"""Within the names of layers that peft has wrapped."""
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_PARTS = ("embed_tokens.", "layers.", "norm.")
"""What a decoder's names begin with where it was saved without the model around it."""
_DERIVED = re.compile(r"(model|model\.layers\.\d+\.self_attn)\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that follow from the configuration."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_TENSORS_AT_ONCE = 8


class StoredTensor(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: str  # safetensors' name
    shape: tuple[int, ...]


class ExpectedTensor(NamedTuple):
    """What a tensor must be."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


@dataclass
class _MappedShard:
    """A file that is open for a few tensors more."""

    shard: Path
    file: safe_open
    left_to_read: int = _TENSORS_AT_ONCE


class Shards:
    """The tensors of a folder by the names that the whole language model has."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: _MappedShard | None = None
        self._mapping = threading.Lock()
        self._placed: dict[str, tuple[Path, str]] = {}  # file, and the name there
        self._beside: list[str] = []  # tensors of a multimodal checkpoint that are not its text decoder's
        held = {shard: _names(shard) for shard in _files(path)}
        inner = {name: name for names in held.values() for name in names}
        if outer := _outer_prefix(inner):
            inner = {name: name.removeprefix(outer) for name in inner}
            if _OUTER[0] in outer:
                inner = _of_base_layers(path, inner)
        everything = list(inner.values())
        bare = not any(name.startswith("model.") for name in everything)
        wrapper = next((each for each in _WRAPPERS if any(name.startswith(each[0]) for name in everything)), None)
        for shard, names in held.items():
            for name in names:
                own = inner[name]
                full = f"model.{own}" if bare and own.startswith(_PARTS) else own
                if wrapper and (full := _unwrapped(own, *wrapper)) == "":
                    self._beside.append(name)
                    continue
                if full in self._placed:
                    raise ModelError(f"{path}: tensor {full!r} lies in {self._placed[full][0].name} and {shard.name}")
                self._placed[full] = shard, name

    def head_is_tied(self, config: ModelConfig) -> bool:
        """Whether the head is the embedding table. A head of its own in the files counts for more than the
        configuration, as in transformers."""
        if not config.tie_word_embeddings:
            return False
        if EMBEDDINGS not in self._placed and HEAD in self._placed:
            self._placed[EMBEDDINGS] = self._placed[HEAD]
        packed = any(name.startswith("lm_head.") and name != HEAD for name in self._placed)
        if not packed and (HEAD not in self._placed or torch.equal(self.tensor(HEAD), self.tensor(EMBEDDINGS))):
            return True
        logger.warning(
            "%s: config.json says that the head is tied to the embeddings, the checkpoint has another %s; it is used",
            self.path,
            HEAD,
        )
        return False

    def check(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        num_layers: int,
        packed: Mapping[str, ExpectedTensor] = MappingProxyType({}),
    ) -> None:
        """Raises ModelError where a tensor of floats (``shapes``) or of packed matrices is missing or has another shape
        or dtype, or one is there whose meaning is not known. Reads the files' headers only."""
        expected = {name: ExpectedTensor(FLOATS, shape) for name, shape in shapes.items()} | dict(packed)
        self._refuse_unknown(expected, num_layers)
        for name in expected:
            if name not in self._placed:
                raise ModelError(f"{self.path}: tensor {name!r} is missing from the checkpoint")
        for name, actual in self.headers(expected).items():
            shard, (dtypes, shape) = self._placed[name][0], expected[name]
            if actual.dtype not in dtypes:
                hint = "; config.json has no quantization_config for it" if name in shapes else ""
                raise ModelError(
                    f"{shard}: tensor {name!r} has dtype {actual.dtype}, expected one of {', '.join(dtypes)}{hint}"
                )
            if actual.shape != shape:
                raise ModelError(f"{shard}: tensor {name!r} has shape {actual.shape}, expected {shape}")

    def headers(self, names: Iterable[str] | None = None) -> dict[str, StoredTensor]:
        """What the headers say of these tensors, or of all."""
        found = {}
        for shard, listed in self._by_shard(self._placed if names is None else names).items():
            with _open(shard) as file:
                for name in listed:
                    entry = file.get_slice(self._placed[name][1])
                    found[name] = StoredTensor(entry.get_dtype(), tuple(entry.get_shape()))
        return found

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of these names. Files are reopened every few tensors: closing drops the mapped pages, which
        would double the resident size."""
        for shard, listed in self._by_shard(names).items():
            for start in range(0, len(listed), _TENSORS_AT_ONCE):
                with _open(shard) as file:
                    for name in listed[start : start + _TENSORS_AT_ONCE]:
                        yield name, file.get_tensor(self._placed[name][1])

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, mapped. A file stays open for the next few tensors, because opening reads its header: SmolLM2
        from a GPTQ checkpoint loads in 1.3 s, and took 2.5 s with a file opened for each."""
        shard, own_name = self._placed[name]
        with self._mapping:
            if self._mapped is None or self._mapped.shard != shard or not self._mapped.left_to_read:
                self._mapped = _MappedShard(shard, _open(shard))
            self._mapped.left_to_read -= 1
            return self._mapped.file.get_tensor(own_name)

    def _by_shard(self, names: Iterable[str]) -> dict[Path, list[str]]:
        by_shard: dict[Path, list[str]] = {}
        for name in names:
            by_shard.setdefault(self._placed[name][0], []).append(name)
        return by_shard

    def _refuse_unknown(self, expected: Mapping[str, ExpectedTensor], num_layers: int) -> None:
        """A scale beside a weight, a bias that the family has not, an adapter: leaving it out would change the model.
        What belongs to no part of the decoder is left out, as in transformers, and named."""
        left_out = list(self._beside)
        for name, (shard, own_name) in self._placed.items():
            if name in expected or name == HEAD or _DERIVED.fullmatch(name):
                continue
            layer = _LAYER.match(name)
            if name.startswith(("model.", "lm_head.")) and not (layer and int(layer[1]) >= num_layers):
                raise ModelError(
                    f"{shard}: tensor {own_name!r} means nothing to this model; a quantised checkpoint, an adapter or "
                    "another architecture than config.json says cannot be read"
                )
            if f"model.{name}" in expected:
                raise ModelError(
                    f"{shard}: tensor {own_name!r} stands there twice, with and without the prefix 'model.'; "
                    "remove the wrong one"
                )
            left_out.append(own_name)
        if left_out:
            logger.warning("%s: left out %d tensors, such as %s", self.path, len(left_out), left_out[0])


def _outer_prefix(names: Collection[str]) -> str:
    """What stands in front of all names because the module was saved inside another."""
    prefix = ""
    while found := next((each for each in _OUTER if all(name.startswith(prefix + each) for name in names)), ""):
        prefix += found
    return prefix


def _of_base_layers(path: Path, names: dict[str, str]) -> dict[str, str]:
    """Names as they were before peft wrapped single layers. Tensors of an adapter keep theirs, and are refused."""
    if any(_PEFT_LAYER in name for name in names.values()):
        logger.warning(
            "%s: was saved by peft, without an adapter; its base layers are read, and what an adapter learned is in "
            "them only if it was merged",
            path,
        )
    return {name: inner.replace(_PEFT_LAYER, ".") for name, inner in names.items()}


def _unwrapped(name: str, decoder: str, head: str) -> str:
    """The name in a language model of a tensor of a multimodal one; empty: it is not of its text decoder."""
    for prefix, own in ((decoder, "model."), (head, "lm_head.")):
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return ""


def _files(path: Path) -> list[Path]:
    """The files that hold the weights; every tensor of the index is where it says."""
    index, single = path / INDEX_FILE, path / SINGLE_FILE
    if single.exists():
        if index.exists():
            logger.warning("%s: holds %s and %s; the first is read", path, SINGLE_FILE, INDEX_FILE)
        return [single]
    if not index.exists():
        raise ModelError(_without_safetensors(path))
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        weight_map, metadata = document["weight_map"], document["metadata"]
        shards = {name: path / Path(shard).name for name, shard in weight_map.items() if Path(shard).name == shard}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{index}: not a readable safetensors index ({error})") from error
    if len(shards) < len(weight_map) or not shards or not isinstance(metadata, dict):
        raise ModelError(f"{index}: must hold metadata and a weight_map that names files of its folder")
    for shard in sorted(set(shards.values())):
        if not shard.is_file():
            raise ModelError(f"{path}: shard {shard.name} is missing; the index names it")
    held = {shard: _names(shard) for shard in set(shards.values())}
    for name, shard in shards.items():
        if name not in held[shard]:
            raise ModelError(f"{shard}: tensor {name!r} is missing, although the index places it here")
    return sorted(held)


def _without_safetensors(path: Path) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if not pickles:
        return f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read"
    return (
        f"{path}: its weights are pickled ({pickles[0]}), and reading them could run any code; only safetensors are "
        "read. Convert what you trust: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), with "
        "FOLDER's tokenizer files beside it"
    )


def _names(shard: Path) -> set[str]:
    with _open(shard) as file:
        return set(file.keys())


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read, probably truncated or no safetensors file ({error})") from error
