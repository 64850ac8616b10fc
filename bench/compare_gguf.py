"""Time llama.cpp and skipkernels on the same GGUF files, in turns in one run: decoding and a prompt of 512 tokens.

    python -m bench.compare_gguf --llama-bench /tmp/llama/build/bin/llama-bench q4_0.gguf q8_0.gguf --json out.json

Each round runs llama-bench once, then ours in a process that holds the model, or the other way round; the ratio is
taken within a round. llama-bench draws its next token at random where skipkernels takes the argmax: the time of that
is part of ours alone. ``--isa`` takes ours down to older instructions (avx2); llama-bench has to be built for them too.
The llama-bench of a fork serves as well: ``--peer`` is its name in the results, ``--repack`` its ``-rtr 1``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from bench.compare_llama_cpp import run, spread

PROMPT_TOKENS, NEW_TOKENS = 512, 64
Speeds = dict[str, float]


@dataclass(frozen=True)
class Peer:
    """A llama-bench: llama.cpp's, or a fork's."""

    name: str
    program: Path
    options: tuple[str, ...] = ()

    def speeds(self, gguf: Path, threads: int) -> Speeds:
        """Tokens per second of a prompt and of decoding."""
        words = ["-m", str(gguf), "-t", str(threads), "-p", str(PROMPT_TOKENS), "-n", str(NEW_TOKENS), "-r", "1"]
        prompt, decode = json.loads(run([str(self.program), *words, *self.options, "-o", "json"]))
        return {"prompt": prompt["avg_ts"], "decode": decode["avg_ts"]}


def ours(engine: Any) -> Speeds:
    """The same of an engine; a prompt of which nothing is cached."""
    prompt = [7919 * number % engine.config.vocab_size for number in range(PROMPT_TOKENS)]
    engine.loop.forget_prefixes()
    (first,) = engine.generate([prompt], max_new_tokens=1, eos_token_ids=())
    (rest,) = engine.generate([prompt[:1]], max_new_tokens=NEW_TOKENS + 1, eos_token_ids=())
    seconds = sum(rest.seconds_per_token[1:])
    return {"prompt": PROMPT_TOKENS / first.time_to_first_token_s, "decode": NEW_TOKENS / seconds}


def compare(peer: Peer, gguf: Path, threads: int, isa: str | None, rounds: int) -> list[dict[str, Any]]:
    """A row for the prompt and one for decoding."""
    from skipkernels import Engine

    engine = Engine.from_pretrained(gguf, num_threads=threads, max_seq_len=PROMPT_TOKENS + NEW_TOKENS)
    if isa is not None:
        use_isa(engine, isa)
    ours(engine)  # a warm-up; llama-bench makes its own
    samples: list[dict[str, Speeds]] = []
    for index in range(rounds):
        takers = {peer.name: lambda: peer.speeds(gguf, threads), "skipkernels": lambda: ours(engine)}
        taken = {system: takers[system]() for system in list(takers)[:: -1 if index % 2 else 1]}
        samples.append(taken)
    rows = []
    for what in ("decode", "prompt"):
        systems = {name: spread([taken[name][what] for taken in samples]) for name in ("skipkernels", peer.name)}
        ratios = spread([taken["skipkernels"][what] / taken[peer.name][what] for taken in samples])
        rows.append(
            {"file": gguf.name, "formats": engine.dtype, "what": what, "isa": isa or "best", "rounds": rounds}
            | {"tokens_per_s": systems, "ratio": ratios}
        )
    return rows


def use_isa(engine: Any, isa: str) -> None:
    """Programs of ``engine`` run on kernels of ``isa`` from here on."""
    from skipkernels.executors.cpu import CpuExecutor
    from skipkernels.program.program import Variant, build_program

    program = build_program(engine.config, engine.weights, engine.state)
    threads = engine.execution.num_threads
    engine._variants[Variant()] = CpuExecutor(program, engine.state, num_threads=threads, isa=isa)


def main(
    ggufs: Annotated[list[Path], typer.Argument(help="GGUF files.", exists=True, dir_okay=False)],
    llama_bench: Annotated[Path, typer.Option(help="The llama-bench program.", exists=True, dir_okay=False)],
    threads: Annotated[int, typer.Option(help="Threads of both.", min=1)] = os.cpu_count() or 1,
    isa: Annotated[str | None, typer.Option(help="Instruction set of ours; default: the best there is.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each system.", min=1)] = 5,
    peer: Annotated[str, typer.Option(help="Whose llama-bench it is, for the results.")] = "llama.cpp",
    repack: Annotated[
        bool, typer.Option("--repack", help="Let ik_llama.cpp rearrange weights at load (-rtr 1).")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write all rows.")] = None,
) -> None:
    """Compare skipkernels with llama.cpp on quantised models."""
    rows = []
    other = Peer(f"{peer}, repacked" if repack else peer, llama_bench, ("-rtr", "1") if repack else ())
    for gguf in ggufs:
        for row in compare(other, gguf, threads, isa, rounds):
            rows.append(row)
            cells = [f"{row['file']} ({row['formats']})", row["what"]]
            for values in (*row["tokens_per_s"].values(), row["ratio"]):
                digits = 2 if values is row["ratio"] else 1
                cells.append(f"{values['median']:.{digits}f} ({values['p20']:.{digits}f}..{values['p80']:.{digits}f})")
            print("| " + " | ".join(cells) + " |", flush=True)
    print(f"median ratio over all: {median(row['ratio']['median'] for row in rows):.2f}")
    if json_path:
        json_path.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
