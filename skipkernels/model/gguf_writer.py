"""From a checkpoint to a GGUF file with everything that llama.cpp and this project need to run it."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType

from skipkernels.errors import ModelError
from skipkernels.model.checkpoint import (
    default_eos_token_ids,
    load_config,
    load_generation_config,
    load_tokenizer,
    resolve_checkpoint,
)
from skipkernels.model.config import DTYPES, ModelConfig, quantization_of, resolve_dtype
from skipkernels.model.gguf_config import ROPE_FACTORS, hf_config
from skipkernels.model.gguf_file import GgufFile
from skipkernels.model.gguf_metadata import add_sizes, architecture_of, rope_factors
from skipkernels.model.gguf_tensors import GgufTensors, expert_of, gguf_names, halves_from_pairs, permuted_heads
from skipkernels.model.gguf_vocabulary import add_vocabulary
from skipkernels.model.matrix import BLOCK_FORMATS, FLOAT_FORMATS
from skipkernels.model.packed.packed_parameters import shard_parameters
from skipkernels.model.parameters import Parameters
from skipkernels.model.quantized import QuantizedParameters
from skipkernels.model.recipe import RECIPES, large_matrices, matrix_formats
from skipkernels.model.shards import Shards
from skipkernels.model.weights import expected_tensors

_FILE_TYPES = {"fp32": "ALL_F32", "fp16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
_NOT_COPIED = ("split.", "general.file_type", "general.quantization_version", "general.architecture")
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Written:
    """A file that was written: its size, its weights' number, and how many tensors have each format."""

    path: Path
    nbytes: int
    num_weights: int
    formats: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.num_weights


@dataclass(frozen=True)
class _Source:
    """A checkpoint that is written anew."""

    parameters: Parameters
    config: ModelConfig
    architecture: str
    add_metadata: Callable[[gguf.GGUFWriter], None]
    rope_factors: torch.Tensor | None


def write_gguf(
    model: str | Path, kind: str, out: Path, *, overwrite: bool = False, report: Report = lambda stage, share: None
) -> Written:
    """Writes ``model`` (what ``Engine.from_pretrained`` takes, but for a module) with its matrices in ``kind``: a name
    of ``RECIPES``, or fp32, fp16 or bf16; norms and biases are fp32.

    ``out`` is there as a whole or not at all. One tensor at a time is in memory; routers are fp32.

    Raises:
        ModelError: the model cannot be read or written, the kind is not known, or ``out`` exists.
    """
    kind = kind.lower()
    if kind not in RECIPES:
        kind = _float_kind(kind)
    path = resolve_checkpoint(model)
    if out.exists() and (path == out or out.samefile(path)):
        raise ModelError(f"{out}: is the model itself; give another name")
    if out.exists() and not overwrite:
        raise ModelError(f"{out}: exists; give another name, or --force to replace it")
    source = _from_gguf(GgufFile(path)) if path.is_file() else _from_folder(path)
    shapes = expected_tensors(source.config)
    if kind in RECIPES:
        formats = matrix_formats(source.config, shapes, kind)
    else:
        formats = dict.fromkeys(large_matrices(source.config, shapes), _float_format(kind))
    parameters = source.parameters
    if kind in RECIPES:
        parameters = QuantizedParameters(parameters, formats, shapes)
    source = replace(source, parameters=parameters)
    with _whole_file(out) as temporary:
        _write(temporary, source, shapes, formats, kind, report)
        nbytes = temporary.stat().st_size
    count = Counter(formats.get(name, "f32") for name in shapes)
    return Written(out, nbytes, sum(math.prod(shape) for shape in shapes.values()), count)


def _write(
    path: Path,
    source: _Source,
    shapes: Mapping[str, tuple[int, ...]],
    formats: Mapping[str, str],
    kind: str,
    report: Report,
) -> None:
    writer = gguf.GGUFWriter(path, source.architecture)
    source.add_metadata(writer)
    writer.add_file_type(LlamaFileType[_FILE_TYPES.get(kind, f"MOSTLY_{kind.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tensors = _tensors(source, shapes)
    for own, names in tensors.items():
        shape = shapes[names[0]]
        whole = shape if expert_of(names[0]) is None else (len(names), *shape)
        _add_info(writer, own, whole, formats.get(names[0], "f32"))
    if source.rope_factors is not None:
        _add_info(writer, ROPE_FACTORS, tuple(source.rope_factors.shape), "f32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = permuted_heads(source.architecture, source.config)
    for index, names in enumerate(tensors.values()):
        report("weights", index / len(tensors))
        shape, order = shapes[names[0]], None
        if (of := heads.get(names[0].split(".")[-2])) is not None:
            order = torch.argsort(halves_from_pairs(shape[0], of))
        parts = [_data(source.parameters, name, shape, formats.get(name, "f32"), order) for name in names]
        writer.write_tensor_data(torch.cat(parts).numpy())
    if source.rope_factors is not None:
        writer.write_tensor_data(source.rope_factors.float().numpy())
    writer.close()


def _tensors(source: _Source, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """The file's tensors, and the parameters in each: one, or those of all experts in their order."""
    names = gguf_names(source.architecture, source.config.num_hidden_layers, shapes)
    tensors: dict[str, list[str]] = {}
    for name in shapes:
        tensors.setdefault(names[name], []).append(name)
    return tensors


def _data(
    parameters: Parameters, name: str, shape: tuple[int, ...], format: str, order: torch.Tensor | None
) -> torch.Tensor:
    """A parameter's bytes as u8, its rows in the file's order."""
    if format in BLOCK_FORMATS:
        data = parameters.blocks(name).data
    else:
        values = torch.empty(shape, dtype=FLOAT_FORMATS[format])
        parameters.copy_floats(name, values)
        data = values.view(torch.uint8).view(shape[0], -1)
    return (data if order is None else data[order]).contiguous()


def _add_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], format: str) -> None:
    kind = GGMLQuantizationType[format.upper()]
    columns, size = GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // columns * size, raw_dtype=kind)


def _from_gguf(file: GgufFile) -> _Source:
    config = ModelConfig.from_hf(hf_config(file))
    tensors = GgufTensors(file, config, expected_tensors(config))

    def add_metadata(writer: gguf.GGUFWriter) -> None:
        for key, value in file.metadata.items():
            kind, of = file.kinds[key]
            if not key.startswith(_NOT_COPIED) and value != []:  # the package cannot write an empty array
                writer.add_key_value(key, value, GGUFValueType(kind), None if of is None else GGUFValueType(of))

    return _Source(tensors, config, str(file.metadata["general.architecture"]), add_metadata, tensors.rope_factors())


def _from_folder(folder: Path) -> _Source:
    own = load_config(folder)
    config = ModelConfig.from_hf(own)
    shards = Shards(folder)
    config = replace(config, tie_word_embeddings=shards.head_is_tied(config))
    architecture = architecture_of(config, str(folder))
    tokenizer = load_tokenizer(folder)
    ends = default_eos_token_ids(tokenizer, load_generation_config(folder))
    parameters = shard_parameters(shards, config, quantization_of(own), expected_tensors(config))

    def add_metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_name(folder.name)
        add_sizes(writer, config)
        if tokenizer is None:
            writer.add_tokenizer_model("no_vocab")
        else:
            add_vocabulary(writer, tokenizer, config.vocab_size, ends, str(folder))

    return _Source(parameters, config, architecture, add_metadata, rope_factors(own, config))


def _float_kind(kind: str) -> str:
    try:
        dtype = resolve_dtype(kind)
    except ModelError as error:
        raise ModelError(f"unknown type {kind!r}; use one of {', '.join((*RECIPES, *DTYPES))}") from error
    return next(name for name, of in DTYPES.items() if of == dtype)


def _float_format(kind: str) -> str:
    return next(name for name, dtype in FLOAT_FORMATS.items() if dtype == DTYPES[kind])


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well, and goes when it does not."""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror})") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's is for its owner alone
        temporary.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)
