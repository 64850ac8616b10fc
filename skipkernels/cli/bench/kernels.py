"""``skipkernels bench kernels``: every op of the program at a model's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipkernels.cli.bench.options import DeviceOptions, numbers
from skipkernels.cli.groups import grouped
from skipkernels.support.console import err, out, print_json, progress_bar, require_folder, require_picture, table

if TYPE_CHECKING:
    from skipkernels.engine import Engine
    from skipkernels.executors.execution import Execution


@grouped
def kernels(
    device_options: DeviceOptions,
    shapes: Annotated[str, typer.Option(help="Shapes of published models, separated by commas.")] = "llama-3.2-1b",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "bf16",
    batch_sizes: Annotated[str, typer.Option(help="Rows decoded together.")] = "1",
    kv_lengths: Annotated[str, typer.Option(help="Cached positions of every row.")] = "128",
    layers: Annotated[int, typer.Option(min=2, help="Layers; together they must be larger than the caches.")] = 4,
    neurons: Annotated[
        float | None, typer.Option(min=0, max=1, help="Leave out all but this share of each layer's neurons.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of ours and of torch's.")] = 5,
    json: Annotated[Path | None, typer.Option(help="Write rows and settings here; '-' prints them alone.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture: bandwidth of every op beside what memory gives.")] = None,
) -> None:
    """Time every op on random weights, beside torch's own op on the same matrices."""
    batches = numbers(batch_sizes, int, "--batch-sizes")
    lengths = numbers(kv_lengths, int, "--kv-lengths")
    require_folder(json)
    require_picture(plot)
    from skipkernels.benchmark.kernels import run_kernel_bench
    from skipkernels.support.report import environment, write_json

    execution = device_options.execution()
    facts = environment(execution)
    rows: list[dict[str, Any]] = []
    runs = [(name, batch, length) for name in shapes.split(",") for batch in batches for length in lengths]
    with progress_bar("timing ops") as report:
        for number, (name, batch, length) in enumerate(runs):
            engine = random_engine(name, dtype, layers, batch, length, execution, neuron_rows=neurons is not None)
            turns = iter(range(1, rounds + 2))
            measured = run_kernel_bench(
                engine,
                kv_len=length,
                rounds=rounds,
                num_threads=device_options.num_threads,
                kept=neurons,
                on_turn=lambda: report(f"{name}, batch {batch}", (number + next(turns) / (rounds + 1)) / len(runs)),  # noqa: B023
            )
            case = {"shapes": name, "dtype": dtype, "batch_size": batch, "kv_len": length, "layers": layers}
            if neurons is not None:
                case["neurons"] = neurons
            rows += [{**case, **row, **facts} for row in measured]
    settings = {"dtype": dtype, "layers": layers, "rounds": rounds, "threads": device_options.num_threads}
    if json is not None and str(json) != "-":
        write_json(json, rows, settings)
    if plot is not None:
        from skipkernels.benchmark.plots import plot_kernels

        plot_kernels(rows, plot, f"{dtype}, {facts['device']}, {facts['date']}")
    if str(json) == "-":
        print_json({"settings": settings, "rows": rows})
    else:
        _print_tables(rows, facts)


def random_engine(
    shapes: str,
    dtype: str,
    layers: int,
    batch_size: int,
    kv_len: int,
    execution: Execution,
    *,
    neuron_rows: bool = False,
) -> Engine:
    """Random weights of the named shapes with fewer layers, and room for ``kv_len`` positions and what is timed."""
    from skipkernels.benchmark.kernels import STEPS
    from skipkernels.benchmark.shapes import shape_config
    from skipkernels.engine import Engine
    from skipkernels.model.config import ModelConfig, resolve_dtype
    from skipkernels.model.weights import fill_rope, random_weights

    length = kv_len + STEPS + 3
    with err.status(f"loading {shapes} ..."):
        hf_config = shape_config(shapes, length)
        hf_config.num_hidden_layers = layers
        config = ModelConfig.from_hf(hf_config)
        weights = random_weights(config, resolve_dtype(dtype), length, device=execution.device, neuron_rows=neuron_rows)
        fill_rope(weights, hf_config)
        return Engine(config, weights, max_seq_len=length, max_batch_size=batch_size, execution=execution)


def _print_tables(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["shapes"], row["batch_size"], row["kv_len"]), []).append(row)
    for (name, batch, length), listed in cases.items():
        title = f"{name}, {listed[0]['dtype']}, batch {batch}, {length} positions, {facts['device']}, {facts['date']}"
        shown = table("op", "us", "p20..p80", "KB", "GB/s", "probe", "torch us", "ratio", title=title)
        shown.padding = (0, 1, 0, 0)  # 80 columns
        for row in listed:
            has_torch = row["torch_us"] is not None
            shown.add_row(
                row["op"],
                _short(row["us"]),
                f"{_short(row['us_p20'])}..{_short(row['us_p80'])}",
                _short(row["bytes"] / 1e3),
                _short(row["gb_per_s"]),
                f"{row['bandwidth_fraction']:.2f}",
                _short(row["torch_us"]) if has_torch else "",
                f"{row['speedup_vs_torch']:.2f}" if has_torch else "",
            )
        out.print(shown)
    out.print("per instruction, cold; probe: GB/s over the bandwidth probed around each turn; ratio: torch over ours")


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
