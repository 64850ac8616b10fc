"""``skipkernels generate``: streams a continuation, then reports what skipping saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipkernels.cli import options as opt
from skipkernels.cli.groups import grouped
from skipkernels.cli.models import ModelOptions, PolicyOptions, SamplingOptions, warn_of_warmup
from skipkernels.skipping.policy import DensePolicy, Policy
from skipkernels.support.console import err, percent, print_json, progress_bar, table

if TYPE_CHECKING:
    from skipkernels.decoding.generation import Generation, SamplingParams
    from skipkernels.engine import Engine, Prompt

DEFAULT_NEW_TOKENS = 128
_ROUNDS = 5
_PATIENCE_S = 4.0
"""A comparison takes about this long; a model too slow for that gets one round."""


@grouped
def generate(
    model_options: ModelOptions,
    prompt: opt.Prompt,
    policy_options: PolicyOptions,
    sampling_options: SamplingOptions,
    max_new_tokens: opt.MaxNewTokens = None,
    stop: opt.Stop = None,
    chat: opt.Chat = False,
    no_compare: Annotated[
        bool, typer.Option("--no-compare", help="Skip the dense run that the speed is compared with.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Continue PROMPT, token by token, and compare the speed with that of the dense model."""
    sampling_options.params()  # a wrong one is refused before the model is loaded
    engine = model_options.load(neuron_rows=policy_options.needs_neuron_rows(model_options))
    sampling = sampling_options.params(engine)
    chosen = policy_options.choose(engine, model_options)
    given: Prompt = [{"role": "user", "content": prompt}] if chat else prompt
    token_ids = engine.encode(given)
    if max_new_tokens is None:
        max_new_tokens = min(DEFAULT_NEW_TOKENS, max(1, engine.max_seq_len - len(token_ids)))
    warn_of_warmup(chosen, max_new_tokens)
    generation = _stream(engine, token_ids, max_new_tokens, sampling, stop or [], chosen, silent=json)
    speeds = {} if no_compare else _compare(engine, token_ids, generation, sampling, chosen)
    if json:
        print_json(_document(model_options.model, chosen, generation, speeds))
    else:
        _print_summary(chosen, generation, speeds)


def _stream(
    engine: Engine,
    token_ids: list[int],
    max_new_tokens: int,
    sampling: SamplingParams,
    stop: list[str],
    policy: Policy,
    *,
    silent: bool,
) -> Generation:
    """Prints the text while it comes, unless ``silent``."""
    generation = None
    for chunk in engine.stream(token_ids, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, policy=policy):
        if not silent:
            print(chunk.text, end="", flush=True)
        generation = chunk.generation
    if not silent:
        print()
    assert generation is not None  # the last chunk carries it
    return generation


def _compare(
    engine: Engine, token_ids: list[int], generation: Generation, sampling: SamplingParams, policy: Policy
) -> dict[str, float]:
    """Tokens per second of the policy and of the dense model on this prompt and number of tokens."""
    from skipkernels.calibration.speed import measure_speeds

    new_tokens = len(generation.token_ids)
    if new_tokens < 2:
        return {}
    policies = [policy] if isinstance(policy, DensePolicy) else [policy, DensePolicy()]
    run_s = len(policies) * (sum(generation.seconds_per_token) + generation.time_to_first_token_s)
    rounds = max(1, min(_ROUNDS, int(_PATIENCE_S / run_s)))
    with progress_bar("decoding again") as report:
        speeds = measure_speeds(
            engine,
            token_ids,
            policies,
            new_tokens=new_tokens,
            rounds=rounds,
            sampling=sampling,
            on_run=lambda share: report("comparing with the dense model", share),
        )
    return {policy.kind: speed.tokens_per_s for policy, speed in zip(policies, speeds, strict=True)}


def _print_summary(policy: Policy, generation: Generation, speeds: dict[str, float]) -> None:
    count, kind = len(generation.token_ids), policy.kind
    rows = table("", "tokens/s", "ms/token", "not read")
    measured = speeds or {kind: generation.tokens_per_s}
    for name, speed in measured.items():
        ratio = generation.unread_ratio if name == kind else 0.0
        shown = (f"{speed:.1f}", f"{1e3 / speed:.2f}") if speed else ("-", "-")  # of a single token there is no speed
        rows.add_row(name, *shown, percent(ratio))
    err.print(rows)
    if kind != "dense":
        err.print(f"[dim]{kind}:[/] {policy.label}")
    notes = [
        f"{count} tokens after {generation.prompt_tokens} of the prompt",
        f"first after {generation.time_to_first_token_s * 1e3:.0f} ms",
        f"ended by {generation.finish_reason}",
    ]
    if len(speeds) == 2:
        notes.insert(0, f"{speeds[kind] / speeds['dense']:.2f}x the dense model's speed")
    err.print(f"[dim]{', '.join(notes)}[/]")


def _document(model: str, policy: Policy, generation: Generation, speeds: dict[str, float]) -> dict[str, Any]:
    compared = len(speeds) == 2
    return {
        "model": model,
        "policy": policy.to_dict(),
        "policy_label": policy.label,
        "text": generation.text,
        "token_ids": generation.token_ids,
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": len(generation.token_ids),
        "skip_ratio": generation.skip_ratio,
        "unread_ratio": generation.unread_ratio,
        "time_to_first_token_s": generation.time_to_first_token_s,
        "tokens_per_s": speeds.get(policy.kind, generation.tokens_per_s),
        "dense_tokens_per_s": speeds.get("dense"),
        "speedup": speeds[policy.kind] / speeds["dense"] if compared else None,
    }
