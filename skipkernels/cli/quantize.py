"""``skipkernels quantize``: writes a model as a GGUF file, quantised."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Annotated

import typer

from skipkernels.cli import options as opt
from skipkernels.cli.models import ModelOptions
from skipkernels.support.console import err, print_json, progress_bar, require_folder


def quantize(
    model: opt.Model,
    type: Annotated[
        str,
        typer.Option(help="q8_0, q6_k, q5_1, q5_0, q4_k_m, q4_1 or q4_0, as llama.cpp has them; or fp32, fp16, bf16."),
    ],
    out_file: Annotated[Path, typer.Option("--out", help="The GGUF file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: opt.Json = False,
) -> None:
    """Write MODEL as a GGUF file with quantised matrices, its tokenizer and its chat template.

    llama.cpp and `skipkernels generate` run the file. Families llama, mistral, qwen2 and qwen3.
    """
    require_folder(out_file)
    path, started = ModelOptions(model).path, time.perf_counter()
    with progress_bar("quantising") as report:
        from skipkernels.model.gguf_writer import write_gguf

        logging.basicConfig(format="%(levelname)s: %(message)s")
        written = write_gguf(path, type, out_file, overwrite=force, report=report)
    seconds = time.perf_counter() - started
    if json:
        print_json(
            {
                "model": model,
                "type": type.lower(),
                "file": str(out_file),
                "bytes": written.nbytes,
                "bits_per_weight": written.bits_per_weight,
                "tensors": dict(written.formats),
                "seconds": seconds,
            }
        )
        return
    held = ", ".join(f"{count} in {format}" for format, count in sorted(written.formats.items()))
    err.print(
        f"{out_file}: {written.nbytes / 1e6:.1f} MB, {written.bits_per_weight:.2f} bits a weight; tensors: {held}; "
        f"{seconds:.1f} s"
    )
