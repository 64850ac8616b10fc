"""``skipkernels bench decode``: whole decode steps of several systems, in turns."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipkernels.cli.bench.options import DeviceOptions, numbers
from skipkernels.cli.groups import grouped
from skipkernels.cli.models import POLICY_FILE, ModelOptions
from skipkernels.errors import RequestError
from skipkernels.support.console import (
    err,
    out,
    percent,
    print_json,
    progress_bar,
    require_folder,
    require_picture,
    table,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skipkernels.benchmark.systems import System
    from skipkernels.engine import Engine
    from skipkernels.executors.execution import Execution
    from skipkernels.model.config import ModelConfig


PEERS = ("transformers", "compiled", "cuda-graph")


@grouped
def decode(
    device_options: DeviceOptions,
    shapes: Annotated[str | None, typer.Option(help="Random weights of a published model's shapes.")] = None,
    model: Annotated[str | None, typer.Option(help="A checkpoint instead of shapes; its --policy decides.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy file for --model (default: the one beside it).")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 (default: bf16, or the checkpoint's).")] = None,
    skip_ratio: Annotated[
        str, typer.Option(help="Ratios to force on random weights; with --model any above 0 means its policy.")
    ] = "0,0.25",
    batch_sizes: Annotated[str, typer.Option(help="Rows decoded together, each its own comparison.")] = "1",
    against: Annotated[
        str,
        typer.Option(
            help="Others on the same weights: transformers (its generate); on a GPU also compiled (with a static "
            "cache) and cuda-graph (of its forward pass); separated by commas."
        ),
    ] = "",
    test_only: Annotated[
        bool, typer.Option("--test-only", help="Also measure the similarity test where it never skips.")
    ] = False,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 32,
    new_tokens: Annotated[int, typer.Option(min=3, help="Tokens decoded in one turn.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every system.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write rows and settings here; '-' prints them alone.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture: time per token over skip ratio.")] = None,
) -> None:
    """Time whole decode steps, all systems in turns in one process."""
    if (shapes is None) == (model is None):
        raise typer.BadParameter("give either --shapes or --model")
    peers = [name for name in against.split(",") if name]
    if unknown := set(peers) - set(PEERS):
        raise typer.BadParameter(f"--against knows {', '.join(PEERS)}, got {sorted(unknown)[0]!r}")
    ratios = numbers(skip_ratio, float, "--skip-ratio")
    batches = numbers(batch_sizes, int, "--batch-sizes")
    require_folder(json)
    require_picture(plot)

    from skipkernels.benchmark.decode import run_decode_bench
    from skipkernels.benchmark.systems import SkipkernelsSystem, policies_for
    from skipkernels.support.report import environment, with_peak_floor, write_json

    execution = device_options.execution()
    if not execution.on_gpu and set(peers) - {"transformers"}:
        raise typer.BadParameter(f"--against {against} needs --device cuda; on a cpu there is 'transformers'")
    length = prompt_tokens + new_tokens
    with err.status(f"loading {shapes or model} ..."):
        if shapes is not None:
            module: PreTrainedModel | None
            engine, module = _random_model(shapes, dtype or "bf16", length, execution)
            prompt = list(range(1, length))
            policies = policies_for(ratios, None, test_only)
            if module is None and peers:
                raise typer.BadParameter(f"--against {against} takes a Llama's shapes or --model, got {shapes}")
        else:
            skipping = any(ratio > 0 for ratio in ratios)
            engine, module = _trained_model(str(model), dtype, length, execution, policy, skipping)
            if module is None and peers:
                raise typer.BadParameter(f"--against {against} needs a Hugging Face checkpoint; {model} is a GGUF file")
            prompt = _prompt(engine, length)
            policies = policies_for([1.0] if skipping else [], engine.policy, with_test_only=False)
        systems: list[System] = []
        for batch_size in batches:
            sized = engine.with_rows(batch_size)
            systems += [SkipkernelsSystem(sized, chosen, batch_size, prompt) for chosen in policies]
            if module is not None:
                systems += [_peer(name, module, engine.config, batch_size, prompt) for name in peers]
    facts = environment(execution)
    settings = {
        "model": shapes or model,
        "random_weights": shapes is not None,
        "dtype": engine.dtype,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "threads": device_options.num_threads,
    }

    def write(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        complete = [with_peak_floor({**row, "dtype": engine.dtype, **facts}) for row in rows]
        if json is not None and str(json) != "-":
            write_json(json, complete, settings)
        return complete

    with progress_bar("decoding") as report:
        turns = rounds * len(systems)
        done = iter(range(1, turns + 1))
        rows = run_decode_bench(
            systems,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            rounds=rounds,
            num_threads=device_options.num_threads,
            device=engine.state.active.device,
            on_turn=lambda: report("decoding in turns", next(done) / turns),
            on_round=write,
        )
    rows = write(rows)
    failed = [row for row in rows if "error" in row]
    how = execution.kernels + " kernels" if execution.on_gpu else f"{device_options.num_threads} threads"
    title = f"{shapes or model}, {engine.dtype}, {how}, {facts['device']}, {facts['date']}"
    if plot is not None:
        from skipkernels.benchmark.plots import plot_decode

        plot_decode([row for row in rows if "error" not in row], plot, title)
    if str(json) == "-":
        print_json({"settings": settings, "rows": rows})
    else:
        _print_table([row for row in rows if "error" not in row], title)
        _print_breakdown(rows)
        for row in failed:
            out.print(f"{row['system']} x{row['batch_size']} failed: {row['error']}")


def _peer(name: str, module: PreTrainedModel, config: ModelConfig, batch_size: int, prompt: list[int]) -> System:
    from skipkernels.benchmark.gpu_peers import CompiledSystem, TorchGraphSystem
    from skipkernels.benchmark.systems import TransformersSystem

    kinds: dict[str, type[TransformersSystem] | type[TorchGraphSystem]] = {
        "transformers": TransformersSystem,
        "compiled": CompiledSystem,
        "cuda-graph": TorchGraphSystem,
    }
    return kinds[name](module, config, batch_size, prompt)


def _random_model(shapes: str, dtype: str, length: int, execution: Execution) -> tuple[Engine, PreTrainedModel | None]:
    """Random weights, and of a Llama's shapes a transformers module on the same storage."""
    from skipkernels.benchmark.shapes import shape_config
    from skipkernels.benchmark.systems import module_over
    from skipkernels.engine import Engine
    from skipkernels.model.config import ModelConfig, resolve_dtype
    from skipkernels.model.weights import fill_rope, random_weights

    hf_config = shape_config(shapes, length)
    config = ModelConfig.from_hf(hf_config)
    weights = random_weights(config, resolve_dtype(dtype), length, device=execution.device)
    fill_rope(weights, hf_config)
    engine = Engine(config, weights, max_seq_len=length, execution=execution)
    if config.model_type != "llama":
        return engine, None
    return engine, module_over(weights, config, hf_config)


def _trained_model(
    model: str, dtype: str | None, length: int, execution: Execution, policy: Path | None, skipping: bool
) -> tuple[Engine, PreTrainedModel | None]:
    """A checkpoint as a transformers module, and an engine on the same storage, which lies as ``policy``, or the one
    beside the checkpoint, wants it. No module of a GGUF file, whose formats transformers does not compute with."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from skipkernels.engine import Engine
    from skipkernels.model.checkpoint import load_tokenizer, resolve_checkpoint
    from skipkernels.model.config import resolve_dtype

    folder = resolve_checkpoint(ModelOptions(model).path)
    blocks = folder.suffix == ".gguf"
    path = policy or (folder.parent if blocks else folder) / POLICY_FILE
    if skipping and not path.exists():
        raise RequestError(f"{path}: no such policy file; make one with `skipkernels calibrate {model}`")
    options = {"policy": path if skipping else None, "max_seq_len": length, **asdict(execution)}
    if blocks:
        return Engine.from_pretrained(folder, dtype=dtype, **options), None
    transformers_logging.disable_progress_bar()
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=resolve_dtype(dtype) if dtype else "auto")
    module.to(execution.device)  # type: ignore[arg-type]  # transformers wraps torch's signature
    return Engine.from_pretrained(module, tokenizer=load_tokenizer(folder), **options), module


def _prompt(engine: Engine, length: int) -> list[int]:
    if engine.tokenizer is None:
        return list(range(1, length))
    text = "The interpreter reads the file and then returns a new object. " * (length // 8 + 1)
    return engine.encode(text)[:length]


def _print_table(rows: list[dict[str, Any]], title: str) -> None:
    headings = ("system", "skip", "ms/token", "p20..p80", "tok/s", "probe", "speed-up", "ideal")
    shown = table(*headings, title=title)
    shown.padding = (0, 1, 0, 0)  # 80 columns
    for row in rows:
        shown.add_row(
            row["system"] if row["batch_size"] == 1 else f"{row['system']} x{row['batch_size']}",
            percent(row["ffn_skip_ratio"]),
            f"{row['ms_per_token']:.4g}",
            f"{row['ms_per_token_p20']:.3g}..{row['ms_per_token_p80']:.3g}",
            f"{row['tokens_per_s']:.4g}",
            f"{row['bandwidth_fraction']:.2f}",
            f"{row['speedup_vs_dense']:.3f}",
            f"{row['ideal_speedup']:.3f}",
        )
    out.print(shown)
    out.print("probe: bytes read per second over the read bandwidth probed around each turn")
    out.print("speed-up: over the dense row; ideal: what the saved bytes alone would give")
    gate = max(row["skip_gate_fraction"] for row in rows)
    if gate:
        out.print(f"similarity test and decision: {gate:.2%} of a step, by the executor's clock")
    if any(row["policy"].startswith("timing") for row in rows):
        out.print("timing only: random weights, forced ratio; test and decision real, tokens without meaning")


def _print_breakdown(rows: list[dict[str, Any]]) -> None:
    """What a token spends where, by the executor's own clock."""
    ours = [row for row in rows if row["instruction_ms"]]
    if not ours:
        return
    headings = [f"{row['ffn_skip_ratio']:.0%} x{row['batch_size']}" for row in ours]
    shown = table("ms in a step, by FFN bytes left out and rows", *headings)
    for op in dict.fromkeys(op for row in ours for op in row["instruction_ms"]):
        shown.add_row(op, *(f"{row['instruction_ms'].get(op, 0.0):.4g}" for row in ours))
    out.print(shown)
