"""Trains the fusion classifier from scratch: ``python -m skipkernels.workloads.fusion.train --out DIR``.

Takes some minutes on one core. Weights are bitwise reproducible for the same seed, library versions and processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer

from skipkernels.support.console import err, progress_bar
from skipkernels.workloads.fusion.clips import ClipSource
from skipkernels.workloads.fusion.network import FusionShape
from skipkernels.workloads.fusion.trainer import Schedule, train


def main(
    out: Annotated[Path, typer.Option(help="Folder for the trained classifier.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = Schedule().steps,
    seed: Annotated[int, typer.Option(help="Seed of weights and clips.")] = 0,
    intermediate: Annotated[
        int,
        typer.Option(
            min=1, help="Width of the FFNs. The wider, the larger the share of decoding time that can be skipped."
        ),
    ] = FusionShape.intermediate,
) -> None:
    """Train the fusion classifier and write it to OUT."""
    train_into(out, Schedule(steps=steps), seed, {"intermediate": intermediate})


def train_into(folder: Path, schedule: Schedule, seed: int, shape: Mapping[str, int] | None = None) -> None:
    """Trains on one thread, which is what makes it reproducible, with a progress bar. ``shape`` as for ``train``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses: list[float] = []
    with progress_bar("training") as report:

        def after_step(loss: float) -> None:
            losses.append(loss)
            report(f"training, loss {loss:.3f}", len(losses) / schedule.steps)

        network = train(ClipSource(), schedule, seed, shape, after_step)
    torch.set_num_threads(threads)
    folder.mkdir(parents=True, exist_ok=True)
    network.save(folder)
    err.print(f"trained {schedule.steps} steps; the last loss is {losses[-1]:.4f}; written to {folder}")


if __name__ == "__main__":
    typer.run(main)
