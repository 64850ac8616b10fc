"""Time llama.cpp and skipkernels on the same decode or prompt, in turns, and print medians and the ratio.

    python bench/compare_llama_cpp.py --llama-bench /tmp/llama/build/bin/llama-bench \
        --gguf /tmp/tinyllama-random-bf16.gguf --json out.json

Each round runs one process of each system; the order alternates, so that a drift of the machine meets both alike.
The ratio is taken within each round. llama-bench draws its next token at random where skipkernels takes the argmax: the
time of sampling is part of ours alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

LLAMA_CPP = "llama.cpp"
SKIPKERNELS = "skipkernels"
GGUF_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


@dataclass(frozen=True)
class Workload:
    """What both systems compute: ``new_tokens`` steps after a cache of ``prompt_tokens``; or, with ``prefill``, the
    prompt itself."""

    shapes: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    threads: int
    model: Path | None = None  # a checkpoint for skipkernels, in place of shapes
    prefill: bool = False


@dataclass(frozen=True)
class Sample:
    """One timed generation, with what the system reports about itself."""

    tokens_per_s: float
    report: dict[str, Any]


def run(command: Sequence[str]) -> str:
    """The standard output of ``command``; an error of one line if it fails."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise SystemExit(f"error: {command[0]}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        last_line = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"error: {command[0]} exited with status {error.returncode}: {last_line}") from error


def sample_llama_cpp(llama_bench: Path, gguf: Path, workload: Workload) -> Sample:
    """One generation of llama-bench, after its own warm-up."""
    asked = {"-p": 0, "-n": workload.new_tokens, "-d": workload.prompt_tokens}
    if workload.prefill:
        asked = {"-p": workload.prompt_tokens, "-n": 0}
    arguments = {"-m": gguf, **asked, "-t": workload.threads}
    words = [str(word) for pair in arguments.items() for word in pair]
    (report,) = json.loads(run([str(llama_bench), *words, "-r", "1", "-o", "json"]))
    if report["model_type"].split()[-1] != GGUF_DTYPES[workload.dtype]:
        raise SystemExit(f"error: {gguf} holds {report['model_type']}, not {workload.dtype}")
    return Sample(report["avg_ts"], report)


def sample_skipkernels(workload: Workload) -> Sample:
    """One dense run of our own bench, installed beside this Python."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        options = {name.replace("_", "-"): value for name, value in asdict(workload).items() if name != "prefill"}
        options |= {"json": out}
        if workload.model:
            del options["shapes"]
        else:
            del options["model"]
        if workload.prefill:
            options |= {"new-tokens": 4, "rounds": 3}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        run([str(Path(sys.executable).with_name("skipkernels")), "bench", "decode", "--skip-ratio", "0", *words])
        (report,) = (row for row in json.loads(out.read_text())["rows"] if row["system"] == SKIPKERNELS)
    return Sample(report["prompt_tokens_per_s" if workload.prefill else "tokens_per_s"], report)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.percentile(values, (20, 50, 80)).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def summarize(samples: dict[str, list[Sample]], bytes_per_token: float) -> dict[str, Any]:
    """A row per system, and the ratio of their speeds round by round."""
    rows = [
        {
            "system": system,
            "rounds": len(taken),
            "tokens_per_s": spread([sample.tokens_per_s for sample in taken]),
            "ms_per_token": spread([1e3 / sample.tokens_per_s for sample in taken]),
            "gb_per_s": spread([sample.tokens_per_s * bytes_per_token / 1e9 for sample in taken]),
        }
        for system, taken in samples.items()
    ]
    pairs = zip(samples[SKIPKERNELS], samples[LLAMA_CPP], strict=True)
    ratios = [ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs]
    return {"rows": rows, "speedup_vs_llama_cpp": spread(ratios)}


def print_table(summary: dict[str, Any], workload: Workload) -> None:
    """The summary for people: median (p20-p80)."""

    def cell(values: dict[str, float], digits: int) -> str:
        return f"{values['median']:.{digits}f} ({values['p20']:.{digits}f}-{values['p80']:.{digits}f})"

    what = "prompt" if workload.prefill else "decoding"
    weights = f"{workload.model or workload.shapes} {workload.dtype}"
    title = f"{what}: {weights}, batch 1, {workload.threads} threads: median (p20-p80)"
    table = Table("system", "tokens/s", "ms/token", "GB/s", title=title)
    for row in summary["rows"]:
        cells = [cell(row["tokens_per_s"], 2), cell(row["ms_per_token"], 1), cell(row["gb_per_s"], 1)]
        table.add_row(row["system"], *cells)
    console = Console()
    console.print(table)
    console.print(f"skipkernels / llama.cpp: {cell(summary['speedup_vs_llama_cpp'], 2)}", highlight=False)


def main(
    llama_bench: Annotated[Path, typer.Option(help="The llama-bench program.", exists=True, dir_okay=False)],
    gguf: Annotated[Path, typer.Option(help="Weights for llama.cpp, of the same shapes.", exists=True, dir_okay=False)],
    shapes: Annotated[str, typer.Option(help="Shapes for skipkernels.")] = "tinyllama-1.1b",
    dtype: Annotated[str, typer.Option(help="Weights of both: the file must hold the same.")] = "bf16",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens in the cache before the first step.", min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(help="Steps timed.", min=1)] = 64,
    model: Annotated[Path | None, typer.Option(help="A checkpoint for skipkernels, in place of shapes.")] = None,
    prefill: Annotated[bool, typer.Option("--prefill", help="Time the prompt instead of the steps after it.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of both.", min=1)] = os.cpu_count() or 1,
    rounds: Annotated[int, typer.Option(help="Runs of each system.", min=1)] = 7,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the summary and every run.")] = None,
) -> None:
    """Compare the dense decode speed of skipkernels with llama.cpp."""
    if dtype not in GGUF_DTYPES:
        raise SystemExit(f"error: unknown dtype {dtype}; known: {', '.join(GGUF_DTYPES)}")
    workload = Workload(shapes, dtype, prompt_tokens, new_tokens, threads, model, prefill)
    takers = {
        LLAMA_CPP: lambda: sample_llama_cpp(llama_bench, gguf, workload),
        SKIPKERNELS: lambda: sample_skipkernels(workload),
    }
    samples: dict[str, list[Sample]] = {system: [] for system in takers}
    for index in track(range(rounds), "Comparing"):
        for system in list(takers)[:: -1 if index % 2 else 1]:
            samples[system].append(takers[system]())
    summary = summarize(samples, samples[SKIPKERNELS][0].report["bytes_per_token"])
    print_table(summary, workload)
    if json_path:
        ours, theirs = samples[SKIPKERNELS][0].report, samples[LLAMA_CPP][0].report
        details = {
            "workload": {
                name: value.name if isinstance(value, Path) else str(value) for name, value in asdict(workload).items()
            },
            "tokens_per_s": {system: [sample.tokens_per_s for sample in taken] for system, taken in samples.items()},
            "llama_cpp": {key: theirs[key] for key in ("build_commit", "backends", "n_threads", "type_k")},
            **{key: ours[key] for key in ("device", "isa", "versions", "commit", "date")},
        }
        json_path.write_text(json.dumps(summary | details, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
