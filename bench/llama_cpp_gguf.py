"""Write a random-weight GGUF file with the shapes of TinyLlama-1.1B, to time llama.cpp without a checkpoint.

    python bench/llama_cpp_gguf.py /tmp/tinyllama-random-bf16.gguf

The time of a decode step does not depend on the values. The file holds no tokenizer: llama-bench feeds random token
ids. One tensor at a time is in memory, 0.5 GB at most. Needs the `bench` extra (the gguf package).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import gguf
import numpy as np
import typer
from rich.progress import track

HIDDEN_SIZE = 2048
INTERMEDIATE_SIZE = 5632
NUM_HIDDEN_LAYERS = 22
NUM_ATTENTION_HEADS = 32
NUM_KEY_VALUE_HEADS = 4
HEAD_DIM = 64
VOCAB_SIZE = 32000
MAX_POSITION_EMBEDDINGS = 2048
RMS_NORM_EPS = 1e-5
ROPE_THETA = 10000.0
WEIGHT_STD = 0.02


class Dtype(StrEnum):
    """What the matrices are stored in; norms are always fp32, as llama.cpp requires."""

    BF16 = "bf16"
    F16 = "f16"


def tensor_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes (rows, columns) of all tensors, as llama.cpp calls them; embeddings are not tied."""
    yield "token_embd.weight", (VOCAB_SIZE, HIDDEN_SIZE)
    for layer in range(NUM_HIDDEN_LAYERS):
        yield f"blk.{layer}.attn_norm.weight", (HIDDEN_SIZE,)
        yield f"blk.{layer}.attn_q.weight", (NUM_ATTENTION_HEADS * HEAD_DIM, HIDDEN_SIZE)
        yield f"blk.{layer}.attn_k.weight", (NUM_KEY_VALUE_HEADS * HEAD_DIM, HIDDEN_SIZE)
        yield f"blk.{layer}.attn_v.weight", (NUM_KEY_VALUE_HEADS * HEAD_DIM, HIDDEN_SIZE)
        yield f"blk.{layer}.attn_output.weight", (HIDDEN_SIZE, NUM_ATTENTION_HEADS * HEAD_DIM)
        yield f"blk.{layer}.ffn_norm.weight", (HIDDEN_SIZE,)
        yield f"blk.{layer}.ffn_gate.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE)
        yield f"blk.{layer}.ffn_up.weight", (INTERMEDIATE_SIZE, HIDDEN_SIZE)
        yield f"blk.{layer}.ffn_down.weight", (HIDDEN_SIZE, INTERMEDIATE_SIZE)
    yield "output_norm.weight", (HIDDEN_SIZE,)
    yield "output.weight", (VOCAB_SIZE, HIDDEN_SIZE)


def write_gguf(path: Path, dtype: Dtype, seed: int) -> None:
    """Write header, metadata and weights to ``path``; norms are 1, matrices normal with WEIGHT_STD."""
    matrix_type = {Dtype.BF16: gguf.GGMLQuantizationType.BF16, Dtype.F16: gguf.GGMLQuantizationType.F16}[dtype]
    file_type = {Dtype.BF16: gguf.LlamaFileType.MOSTLY_BF16, Dtype.F16: gguf.LlamaFileType.MOSTLY_F16}[dtype]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_name(f"TinyLlama-1.1B shapes, random {dtype} weights")
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_context_length(MAX_POSITION_EMBEDDINGS)
    writer.add_embedding_length(HIDDEN_SIZE)
    writer.add_feed_forward_length(INTERMEDIATE_SIZE)
    writer.add_block_count(NUM_HIDDEN_LAYERS)
    writer.add_head_count(NUM_ATTENTION_HEADS)
    writer.add_head_count_kv(NUM_KEY_VALUE_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(RMS_NORM_EPS)

    shapes = list(tensor_shapes())
    types = [gguf.GGMLQuantizationType.F32 if len(shape) == 1 else matrix_type for _, shape in shapes]
    for (name, shape), kind in zip(shapes, types, strict=True):
        itemsize = gguf.GGML_QUANT_SIZES[kind][1]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) * itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    rng = np.random.default_rng(seed)
    for (_, shape), kind in track(zip(shapes, types, strict=True), f"Writing {path}", total=len(shapes)):
        if len(shape) == 1:
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            values = rng.standard_normal(shape, np.float32)
            values *= WEIGHT_STD
            writer.write_tensor_data(gguf.quantize(values, kind))
    writer.close()


def main(
    path: Annotated[Path, typer.Argument(help="The file to write, 2.2 GB.")],
    dtype: Annotated[Dtype, typer.Option(help="Storage of the matrices.")] = Dtype.BF16,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a random-weight TinyLlama-1.1B in GGUF format."""
    write_gguf(path, dtype, seed)


if __name__ == "__main__":
    typer.run(main)
