"""The model of ``bench serving``: the fusion classifier, trained and profiled once, or only a profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipkernels.cli.bench.options import numbers
from skipkernels.support.console import progress_bar

if TYPE_CHECKING:
    from skipkernels.executors.execution import Execution
    from skipkernels.modality.profile import Profile
    from skipkernels.modality.profiler import Sample
    from skipkernels.workloads.fusion.model import FusionModel

_PANEL = "Model"
_VALIDATION_SEED, _HELD_OUT_SEED = 1_000_001, 2_000_003  # apart from all training seeds


@dataclass(frozen=True)
class ModelOptions:
    """The model or profile to serve."""

    workload: Annotated[
        str,
        typer.Option(
            help="fusion: the classifier of sound and video, on a real server; synthetic: the original's accuracies "
            "with times assumed from token counts, simulated; or a profile file, simulated.",
            rich_help_panel=_PANEL,
        ),
    ] = "fusion"
    model_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the fusion classifier and its profile. If they are missing, they are trained and measured.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    train_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Training steps, if the classifier is missing; default: those of the trainer.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    skip_levels: Annotated[
        str, typer.Option(help="Skip ratios; each is a strategy with every modality subset.", rich_help_panel=_PANEL)
    ] = "0,0.2,0.4"
    max_batch_size: Annotated[int, typer.Option(min=1, max=16, rich_help_panel=_PANEL)] = 16
    profile_samples: Annotated[
        int, typer.Option(min=1, help="Validation clips for the promised accuracies.", rich_help_panel=_PANEL)
    ] = 1000
    profile_rounds: Annotated[
        int, typer.Option(min=2, help="Timings of each strategy and batch size.", rich_help_panel=_PANEL)
    ] = 20

    def __post_init__(self) -> None:
        if self.workload == "fusion" and self.model_dir is None:
            raise typer.BadParameter("--workload fusion needs --model-dir, a folder for the classifier and its profile")
        if self.workload not in ("fusion", "synthetic") and not Path(self.workload).is_file():
            raise typer.BadParameter(
                f"--workload is fusion, synthetic or a profile file; there is no file {self.workload!r}"
            )

    def fixed_profile(self) -> Profile:
        """The profile of a workload without a model."""
        from skipkernels.modality.profile_file import load_profile
        from skipkernels.workloads.synthetic import tvlt_mosei

        return tvlt_mosei() if self.workload == "synthetic" else load_profile(self.workload)

    def fusion(self, execution: Execution) -> tuple[FusionModel, Profile]:
        """The classifier and its profile, both from ``model_dir``."""
        from transformers.utils import logging as transformers_logging

        from skipkernels.modality.profile_file import load_profile, save_profile
        from skipkernels.modality.profiler import measure_profile
        from skipkernels.workloads.fusion.model import FusionModel
        from skipkernels.workloads.fusion.network import FusionNetwork
        from skipkernels.workloads.fusion.train import train_into
        from skipkernels.workloads.fusion.trainer import Schedule

        assert self.model_dir is not None
        transformers_logging.disable_progress_bar()
        if not (self.model_dir / "fusion.json").exists():
            train_into(self.model_dir, Schedule(steps=self.train_steps or Schedule().steps), seed=0)
        model = FusionModel(
            FusionNetwork.load(self.model_dir),
            numbers(self.skip_levels, float, "--skip-levels"),
            max_batch_size=self.max_batch_size,
            num_threads=execution.num_threads,
        )
        path = self.model_dir / "serving_profile.json"
        if path.exists():
            return model, load_profile(path, model=model)
        with progress_bar("profiling") as report:
            profile = measure_profile(
                model,
                clips(self.profile_samples, _VALIDATION_SEED),
                batch_sizes=[size for size in (1, 2, 4, 8, 16) if size <= self.max_batch_size],
                rounds=self.profile_rounds,
                memory=False,
                journal=self.model_dir / "serving_profile.journal",
                progress=report,
            )
        save_profile(path, profile)
        return model, profile

    def held_out(self) -> list[Sample]:
        """Clips that neither training nor profiling has seen."""
        return clips(self.profile_samples, _HELD_OUT_SEED)


def clips(count: int, seed: int) -> list[Sample]:
    import numpy as np

    from skipkernels.workloads.fusion.clips import ClipSource
    from skipkernels.workloads.fusion.model import samples_of

    return samples_of(ClipSource().draw(count, np.random.default_rng(seed)))
