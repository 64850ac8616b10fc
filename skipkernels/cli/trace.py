"""``skipkernels trace``: a map of what each generated token ran, skipped and left out of its FFNs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from skipkernels.cli import options as opt
from skipkernels.cli.groups import grouped
from skipkernels.cli.models import ModelOptions, PolicyOptions, SamplingOptions, warn_of_warmup
from skipkernels.support.console import out, percent, print_json, require_picture


@grouped
def trace(
    model_options: ModelOptions,
    prompt: opt.Prompt,
    policy_options: PolicyOptions,
    sampling_options: SamplingOptions,
    png: Annotated[Path | None, typer.Option(help="Draw the map to this PNG as well.")] = None,
    max_new_tokens: opt.MaxNewTokens = 48,
    stop: opt.Stop = None,
    chat: opt.Chat = False,
    json: opt.Json = False,
) -> None:
    """Show what each generated token left out of its FFNs: a line per token, a character per layer."""
    from skipkernels.calibration.trace import Cell, TraceMap, legend, render

    require_picture(png)
    engine = model_options.load(neuron_rows=policy_options.needs_neuron_rows(model_options))
    chosen = policy_options.choose(engine, model_options)
    warn_of_warmup(chosen, max_new_tokens)
    (generation,) = engine.generate(
        [[{"role": "user", "content": prompt}] if chat else prompt],
        max_new_tokens=max_new_tokens,
        sampling=sampling_options.params(engine),
        stop=stop or [],
        policy=chosen,
    )
    trace_map = TraceMap.of(generation, engine.tokenizer)
    summary = f"{percent(generation.unread_ratio)} of the FFN bytes not read: {chosen.label}"
    if png is not None:
        from skipkernels.calibration.plots import plot_trace

        plot_trace(trace_map, png, summary)
    if json:
        print_json(
            {
                "model": model_options.model,
                "policy": chosen.to_dict(),
                "policy_label": chosen.label,
                "text": generation.text,
                "tokens": trace_map.tokens,
                "token_ids": generation.token_ids,
                "skip_ratio": generation.skip_ratio,
                "unread_ratio": generation.unread_ratio,
                "unread": np.round(generation.unread_map, 4).tolist(),
                "skipped": trace_map.skipped.tolist(),
                "triggered": (trace_map.cells == Cell.TRIGGERED).tolist(),
                "similarity": generation.similarity_map.tolist(),
            }
        )
        return
    out.print(render(trace_map, out.width), soft_wrap=True, end="")
    out.print(legend(trace_map))
    out.print(summary)
    if png is not None:
        out.print(f"wrote {png}")
