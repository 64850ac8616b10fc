"""The safetensors files of a checkpoint: which tensor lies where, and whether all of it is understood."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from skipkernels.errors import ModelError
from skipkernels.model.config import ModelConfig

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_DTYPES = ("F32", "BF16", "F16")
_WRAPPERS = (
    ("language_model.model.", "language_model.lm_head."),
    ("model.language_model.", "lm_head."),
    ("model.text_model.", "lm_head."),
)
"""Where multimodal checkpoints hold their text decoder and its head."""
_PARTS = ("embed_tokens.", "layers.", "norm.")
"""What a decoder's names begin with where it was saved without the model around it."""
_DERIVED = re.compile(r"(model|model\.layers\.\d+\.self_attn)\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that follow from the configuration."""
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_TENSORS_AT_ONCE = 8


class Shards:
    """The tensors of a folder by the names that the whole language model has."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._placed: dict[str, tuple[Path, str]] = {}  # file, and the name there
        self._beside: list[str] = []  # tensors of a multimodal checkpoint that are not its text decoder's
        held = {shard: _names(shard) for shard in _files(path)}
        everything = [name for names in held.values() for name in names]
        bare = not any(name.startswith("model.") for name in everything)
        wrapper = next((each for each in _WRAPPERS if any(name.startswith(each[0]) for name in everything)), None)
        for shard, names in held.items():
            for name in names:
                full = f"model.{name}" if bare and name.startswith(_PARTS) else name
                if wrapper and (full := _unwrapped(name, *wrapper)) == "":
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
        if HEAD not in self._placed or torch.equal(self.tensor(HEAD), self.tensor(EMBEDDINGS)):
            return True
        logger.warning(
            "%s: config.json says that the head is tied to the embeddings, the checkpoint has another %s; it is used",
            self._path,
            HEAD,
        )
        return False

    def check(self, shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> None:
        """Raises ModelError where a tensor is missing or has another shape or dtype, or one is there whose meaning is
        not known. Reads the files' headers only."""
        self._refuse_unknown(shapes, num_layers)
        for name in shapes:
            if name not in self._placed:
                raise ModelError(f"{self._path}: tensor {name!r} is missing from the checkpoint")
        for shard, names in self._by_shard(shapes).items():
            with _open(shard) as file:
                for name in names:
                    entry = file.get_slice(self._placed[name][1])
                    dtype, actual = entry.get_dtype(), tuple(entry.get_shape())
                    if dtype not in _DTYPES:
                        raise ModelError(
                            f"{shard}: tensor {name!r} has dtype {dtype}, expected one of {', '.join(_DTYPES)}; "
                            "quantised weights are not read"
                        )
                    if actual != shapes[name]:
                        raise ModelError(f"{shard}: tensor {name!r} has shape {actual}, expected {shapes[name]}")

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of these names. Files are reopened every few tensors: closing drops the mapped pages, which
        would double the resident size."""
        for shard, listed in self._by_shard(names).items():
            for start in range(0, len(listed), _TENSORS_AT_ONCE):
                with _open(shard) as file:
                    for name in listed[start : start + _TENSORS_AT_ONCE]:
                        yield name, file.get_tensor(self._placed[name][1])

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, mapped."""
        shard, own_name = self._placed[name]
        with _open(shard) as file:
            return file.get_tensor(own_name)

    def _by_shard(self, names: Iterable[str]) -> dict[Path, list[str]]:
        by_shard: dict[Path, list[str]] = {}
        for name in names:
            by_shard.setdefault(self._placed[name][0], []).append(name)
        return by_shard

    def _refuse_unknown(self, shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> None:
        """A scale beside a weight, a bias that the family has not, an adapter: leaving it out would change the model.
        What belongs to no part of the decoder is left out, as in transformers, and named."""
        left_out = list(self._beside)
        for name, (shard, own_name) in self._placed.items():
            if name in shapes or name == HEAD or _DERIVED.fullmatch(name):
                continue
            layer = _LAYER.match(name)
            if name.startswith(("model.", "lm_head.")) and not (layer and int(layer[1]) >= num_layers):
                raise ModelError(
                    f"{shard}: tensor {own_name!r} means nothing to this model; a quantised checkpoint, an adapter or "
                    "another architecture than config.json says cannot be read"
                )
            if f"model.{name}" in shapes:
                raise ModelError(
                    f"{shard}: tensor {own_name!r} stands there twice, with and without the prefix 'model.'; "
                    "remove the wrong one"
                )
            left_out.append(own_name)
        if left_out:
            logger.warning("%s: left out %d tensors, such as %s", self._path, len(left_out), left_out[0])


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
        raise ModelError(f"{path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read")
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


def _names(shard: Path) -> set[str]:
    with _open(shard) as file:
        return set(file.keys())


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read, probably truncated or no safetensors file ({error})") from error
