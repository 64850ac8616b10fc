"""Options that several commands share, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipkernels.support.machine import MAX_THREADS

_MODEL_PANEL = "Model"
_POLICY_PANEL = "Which FFNs to skip"
_SAMPLING_PANEL = "Sampling (default: greedy)"

Model = Annotated[str, typer.Argument(help='Checkpoint folder, hub id, GGUF file, or "demo".', show_default=False)]
Prompt = Annotated[str, typer.Argument(help="Text to continue.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]

Dtype = Annotated[
    str | None,
    typer.Option(
        help="fp32, bf16 or fp16; or quantised while loading: q8_0, q6_k, q5_1, q5_0, q4_k_m, q4_1 or q4_0. Default: "
        "the checkpoint's own.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_THREADS,
        help="Default: all processors that may be used, or OMP_NUM_THREADS.",
        rich_help_panel=_MODEL_PANEL,
    ),
]
Executor = Annotated[
    str, typer.Option(help="auto; or reference, which defines what is right.", rich_help_panel=_MODEL_PANEL)
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.", rich_help_panel=_MODEL_PANEL)]
Kernels = Annotated[str, typer.Option(help="Kernels on cuda: auto, cuda or triton.", rich_help_panel=_MODEL_PANEL)]
Conditional = Annotated[
    str, typer.Option(help="How a CUDA graph skips: auto, predicate or if_node.", rich_help_panel=_MODEL_PANEL)
]
Loop = Annotated[
    str, typer.Option(help="How CUDA graphs make a generation: auto, replay or while.", rich_help_panel=_MODEL_PANEL)
]
MaxSeqLen = Annotated[
    int | None,
    typer.Option(
        help="Maximum context length, prompt included; default: the model's, at most 4096.",
        rich_help_panel=_MODEL_PANEL,
    ),
]

Dense = Annotated[bool, typer.Option("--dense", help="Skip nothing.", rich_help_panel=_POLICY_PANEL)]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="A policy file of `skipkernels calibrate`, or the name of a policy that comes with the package (see "
        "docs/policies.md); default: skip_policy.json in the model's folder, if any.",
        rich_help_panel=_POLICY_PANEL,
    ),
]
SkipRatio = Annotated[
    float | None,
    typer.Option(help="Calibrate first, for this share of FFN bytes not read.", rich_help_panel=_POLICY_PANEL),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        help="A file of text to calibrate on; may be given more than once. Default: reference, docstrings and "
        "source code of Python.",
        rich_help_panel=_POLICY_PANEL,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Skip the following FFNs at this cosine similarity or above.", rich_help_panel=_POLICY_PANEL),
]
TargetRatio = Annotated[
    float | None,
    typer.Option(
        help="Hold the skip ratio of each row at this value, by adapting its threshold.",
        rich_help_panel=_POLICY_PANEL,
    ),
]
Span = Annotated[
    str | None,
    typer.Option(
        help="Layers that one trigger skips, or 'all' up to the last dense layers.", rich_help_panel=_POLICY_PANEL
    ),
]
FirstDenseLayers = Annotated[
    int | None, typer.Option(help="First layers, which never skip their FFN.", rich_help_panel=_POLICY_PANEL)
]
LastDenseLayers = Annotated[
    int | None, typer.Option(help="Last layers, which never skip their FFN.", rich_help_panel=_POLICY_PANEL)
]
WarmupTokens = Annotated[
    int | None,
    typer.Option(
        help="First generated tokens, which skip nothing; default: 25, or calibrated.", rich_help_panel=_POLICY_PANEL
    ),
]
BatchRule = Annotated[
    str | None,
    typer.Option(help="per_row (exact), all or majority; default: per_row.", rich_help_panel=_POLICY_PANEL),
]

MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Maximum number of generated tokens; default: 128 (trace: 48).")
]
Stop = Annotated[list[str] | None, typer.Option(help="Stop string; may be given several times.")]
Chat = Annotated[bool, typer.Option("--chat", help="Send PROMPT as a user's message through the chat template.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel=_SAMPLING_PANEL)]
TopK = Annotated[int, typer.Option(help="Keep the k most likely tokens; 0: all.", rich_help_panel=_SAMPLING_PANEL)]
TopP = Annotated[
    float,
    typer.Option(
        help="Keep the most likely tokens that together have this probability.", rich_help_panel=_SAMPLING_PANEL
    ),
]
MinP = Annotated[
    float,
    typer.Option(
        help="Keep tokens at least this fraction as likely as the most likely one.", rich_help_panel=_SAMPLING_PANEL
    ),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(help="1 is none; default: the model's own.", rich_help_panel=_SAMPLING_PANEL)
]
Seed = Annotated[int, typer.Option(help="Same seed, same tokens.", rich_help_panel=_SAMPLING_PANEL)]
